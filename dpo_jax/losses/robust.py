"""rDPO: an unbiased loss under labels flipped at a known rate."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2403.00409", divergences=True)
def robust(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.1,
) -> LossOutput:
  """Robust DPO, Ray Chowdhury et al. 2024 (2403.00409).

      (-(1-e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2e),
      d = beta * (h_w - h_l),   h = log pi(y|x) - log ref(y|x)

  Its mean over labels that are flipped with probability e is DPO's loss on the
  true ones, where cDPO's is not. The price: it is negative and unbounded below
  for a wide margin. At e = 0 it is DPO.

  TRL divides by 1 - 2e for e = 0.5 with a warning only; here that is refused.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: as in `dpo`; larger keeps nearer to the reference.
    label_smoothing: in [0, 0.5), the rate of flipped labels; the larger, the
      larger the gradients and their variance, by 1 / (1 - 2e).
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("label_smoothing", label_smoothing, 0.0, 0.4999)
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  margins = chosen - rejected
  loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins)
  loss += label_smoothing * jax.nn.log_sigmoid(-margins)
  return LossOutput(
    loss / (1 - 2 * label_smoothing),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
