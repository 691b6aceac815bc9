"""APO-down: both responses down, the rejected one further."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2408.06266")
def apo_down(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.1,
) -> LossOutput:
  """Anchored Preference Optimization (down), D'Oosterlinck et al. 2024
  (2408.06266), eq. 8.

      sigmoid(r_w) + 1 - sigmoid(r_w - r_l),
      r = beta * (log pi(y|x) - log ref(y|x))

  For chosen responses worse than what the policy writes by itself: it should
  not imitate them, only prefer them to the rejected ones.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: larger saturates nearer to the reference.
  """
  check_range("beta", beta, 0.0, float("inf"))
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  return LossOutput(
    jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
