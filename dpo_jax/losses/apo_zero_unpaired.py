"""APO-zero on labels: KTO without its reference point."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, unpaired_metrics
from dpo_jax.losses.registry import register


@register(paper="2408.06266")
def apo_zero_unpaired(
  policy_logps: jax.Array,
  reference_logps: jax.Array,
  desirable: jax.Array,
  *,
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> LossOutput:
  """APO-zero, D'Oosterlinck et al. 2024 (2408.06266), eq. 7, one half each.

      desirable:    lambda_D * (1 - sigmoid(r))
      undesirable:  lambda_U * sigmoid(r),   r = beta * (log pi - log ref)

  KTO with z0 = 0: no mismatched completion is scored and no example sees
  another. The mean is over examples, not over class weights, as in TRL.

  Args:
    policy_logps: f[...].
    reference_logps: f[...].
    desirable: bool[...].
    beta: larger saturates nearer to the reference.
    desirable_weight: lambda_D; larger counts liked examples more.
    undesirable_weight: lambda_U; larger counts disliked ones more.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("desirable_weight", desirable_weight, 0.0, float("inf"))
  check_range("undesirable_weight", undesirable_weight, 0.0, float("inf"))
  desirable = desirable.astype(policy_logps.dtype)
  rewards = beta * (policy_logps - reference_logps)
  liked = desirable_weight * jax.nn.sigmoid(-rewards)
  disliked = undesirable_weight * jax.nn.sigmoid(rewards)
  return LossOutput(
    desirable * liked + (1 - desirable) * disliked,
    unpaired_metrics(rewards, policy_logps, desirable),
  )
