"""TR-DPO: a reference that follows the policy."""

from typing import Any

import jax


def mix_reference(reference: Any, policy: Any, mixup: float) -> Any:
  """Moves the reference towards the policy, Gorbatovski et al. 2024
  (2404.09656).

      ref <- (1 - mixup) * ref + mixup * policy

  `mixup` = 1 is the hard update, a copy; below it is the soft one.

  Args:
    reference: tree of arrays.
    policy: tree like `reference`.
    mixup: in [0, 1]; larger follows faster.

  Returns:
    Tree like `reference`, in its dtypes.
  """
  return jax.tree.map(
    lambda r, p: ((1 - mixup) * r + mixup * p).astype(r.dtype),
    reference,
    policy,
  )
