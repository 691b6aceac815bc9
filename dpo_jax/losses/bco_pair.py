"""BCO on pairs: each response classified by itself, without a shift."""

import jax
from jax.nn import log_sigmoid

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2404.04656")
def bco_pair(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.1,
) -> LossOutput:
  """Binary classifier on pairs, after Jung et al. 2024 (2404.04656).

      -log sigmoid(r_w) - log sigmoid(-r_l),
      r = beta * (log pi(y|x) - log ref(y|x))

  An upper bound of DPO's loss. The reward shift delta of the paper is 0 here,
  as in TRL from 0.29 on; earlier versions subtracted a running mean, EasyDeL a
  batch mean with its gradient. With the shift, on labels: `bco`.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: larger keeps nearer to the reference.
  """
  check_range("beta", beta, 0.0, float("inf"))
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  return LossOutput(
    -log_sigmoid(chosen) - log_sigmoid(-rejected),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
