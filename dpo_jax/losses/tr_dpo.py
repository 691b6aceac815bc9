"""TR-DPO: a reference that follows the policy."""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import check_range


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
    Tree like `reference`, in its dtypes; what is smaller than their rounding
    (a small mixup in bfloat16) is lost.

  Raises:
    ValueError: mixup out of range.
  """
  check_range("mixup", mixup, 0.0, 1.0)

  def one(r, p):
    wide = jnp.promote_types(r.dtype, jnp.float32)
    a, b = r.astype(wide), p.astype(wide)
    # In this form equal weights stay what they are.
    return jnp.where(mixup == 1, b, a + mixup * (b - a)).astype(r.dtype)

  return jax.tree.map(one, reference, policy)
