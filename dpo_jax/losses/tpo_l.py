"""TPO-L: TPO with length-normalised rewards and a target margin."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, mean_logps
from dpo_jax.losses.registry import register
from dpo_jax.losses.simpo import simpo


@register(paper="2405.16681", aggregation="mean")
def tpo_l(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  policy_gold_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  gold_lengths: jax.Array,
  *,
  beta: float = 2.0,
  gamma: float = 1.6,
  alpha: float = 0.05,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """Triple Preference Optimization, length-controlled (2405.16681).

      -log sigmoid(beta * (m_w - m_l) - gamma) - alpha * m_g,
      m = log pi(y|x) / |y|

  SimPO on the pair, likelihood of the gold response; see `tpo`.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    policy_gold_logps: f[...].
    chosen_lengths: f[...].
    rejected_lengths: f[...].
    gold_lengths: f[...].
    beta: as in `simpo`; larger is content with a smaller difference.
    gamma: target margin of the rewards; larger asks for a larger difference.
    alpha: larger imitates the gold response more.
    label_smoothing: in [0, 0.5], as in `dpo`.
  """
  check_range("alpha", alpha, 0.0, float("inf"))
  out = simpo(
    policy_chosen_logps,
    policy_rejected_logps,
    chosen_lengths,
    rejected_lengths,
    beta=beta,
    gamma=gamma,
    label_smoothing=label_smoothing,
  )
  nll = -mean_logps(policy_gold_logps, gold_lengths)
  return LossOutput(out.loss + alpha * nll, out.metrics | {"nll_loss": nll})
