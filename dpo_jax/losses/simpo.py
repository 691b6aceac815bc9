"""SimPO: length-normalised, with a target margin, no reference."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  mean_logps,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2405.14734", aggregation="mean")
def simpo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  *,
  beta: float = 2.0,
  gamma: float = 0.5,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """Simple Preference Optimization, Meng et al. 2024 (2405.14734).

      -log sigmoid(beta * (m_w - m_l) - gamma),   m = log pi(y|x) / |y|

  gamma has two conventions. Here, as in the paper and in TRL (`simpo_gamma`),
  it is the target margin of the rewards beta * m. The authors' scripts and
  HALOs take its ratio to beta (`gamma_beta_ratio` 0.25): gamma = ratio * beta.
  TRL's `loss_type="simpo"` at its defaults is another method at another
  strength: beta 0.1, and `cpo_alpha` 1 adds a likelihood (`cpo_simpo`).

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    chosen_lengths: f[...].
    rejected_lengths: f[...].
    beta: scale of the rewards, in nats a token; larger lets a pair be content
      with a smaller difference.
    gamma: target margin; larger asks for a larger difference.
    label_smoothing: in [0, 0.5], as in `dpo`.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("gamma", gamma, 0.0, float("inf"))
  check_range("label_smoothing", label_smoothing, 0.0, 0.5)
  chosen = beta * mean_logps(policy_chosen_logps, chosen_lengths)
  rejected = beta * mean_logps(policy_rejected_logps, rejected_lengths)
  return LossOutput(
    binary_nll(chosen - rejected - gamma, label_smoothing),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
