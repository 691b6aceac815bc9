"""DPO and its label-smoothed form."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2305.18290", divergences=True)
def dpo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """Direct Preference Optimization, Rafailov et al. 2023 (2305.18290), eq. 7.

      -log sigmoid(beta * (h_w - h_l)),   h = log pi(y|x) - log ref(y|x)

  With `label_smoothing` e > 0 it is cDPO (Mitchell 2023): the binary cross
  entropy against labels that are wrong with probability e,
  `-(1-e) log sigmoid(d) - e log sigmoid(-d)`, whose optimum is a finite margin
  d = log((1-e)/e). TRL 0.29 and later accept that option and ignore it.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: strength of the KL constraint. A larger beta keeps the policy nearer
      to the reference, and at the reference gives larger raw gradients, which
      are beta/2 times those of the log-prob difference.
    label_smoothing: in [0, 0.5], the assumed rate of flipped labels; the
      larger, the smaller the margin at which a pair is content.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("label_smoothing", label_smoothing, 0.0, 0.5)
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  return LossOutput(
    binary_nll(chosen - rejected, label_smoothing),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
