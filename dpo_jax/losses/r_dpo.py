"""R-DPO: DPO for a reward from which length is subtracted."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2403.19159", divergences=True)
def r_dpo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  *,
  beta: float = 0.1,
  alpha: float = 0.01,
) -> LossOutput:
  """Length-regularised DPO, Park et al. 2024 (2403.19159), eq. 9.

      -log sigmoid(beta * (h_w - h_l) + alpha * (|y_w| - |y_l|)),
      h = log pi(y|x) - log ref(y|x)

  The policy that maximises E[r - alpha |y|] - beta KL has
  r = beta h + alpha |y| + beta log Z, hence the plus: a preference that length
  explains moves the policy less. With a minus, as the formula is also met, the
  policy would learn to be longer.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    chosen_lengths: f[...].
    rejected_lengths: f[...].
    beta: larger keeps nearer to the reference.
    alpha: reward that a token costs; larger makes answers shorter.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("alpha", alpha, 0.0, float("inf"))
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  longer = chosen_lengths - rejected_lengths
  return LossOutput(
    binary_nll(chosen - rejected + alpha * longer),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
