"""CPO-SimPO: SimPO's margin with CPO's likelihood term."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, mean_logps
from dpo_jax.losses.registry import register
from dpo_jax.losses.simpo import simpo


@register(paper="2401.08417, 2405.14734", aggregation="mean")
def cpo_simpo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  *,
  beta: float = 10.0,
  gamma: float = 5.4,
  alpha: float = 0.05,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """SimPO (2405.14734) with the likelihood term of CPO (2401.08417).

      -log sigmoid(beta * (m_w - m_l) - gamma) - alpha * m_w,
      m = log pi(y|x) / |y|

  The combination and its defaults are those of CPO's authors. TRL has it as
  `loss_type="simpo"` with `cpo_alpha` above 0, and averages the likelihood over
  all tokens of the batch; here each example counts once.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    chosen_lengths: f[...].
    rejected_lengths: f[...].
    beta: as in `simpo`; larger is content with a smaller difference.
    gamma: target margin of the rewards; larger asks for a larger difference.
    alpha: larger imitates the chosen response more.
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
  nll = -mean_logps(policy_chosen_logps, chosen_lengths)
  return LossOutput(out.loss + alpha * nll, out.metrics | {"nll_loss": nll})
