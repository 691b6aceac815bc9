"""SLiC-HF: a hinge on log-probs and a likelihood, no reference."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2305.10425")
def slic(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  *,
  delta: float = 1.0,
  lam: float = 0.1,
) -> LossOutput:
  """Sequence Likelihood Calibration, Zhao et al. 2023 (2305.10425), eq. 4.

      max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - lam * log pi(y_w|x)

  The likelihood is that of the chosen response, as in HALOs, where the paper
  also allows the SFT target. Other libraries' `hinge` is `losses.hinge`, with a
  reference and without likelihood.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    delta: margin in nats at which a pair is content; larger asks for more.
    lam: the paper's lambda; larger imitates the chosen response more.
  """
  check_range("delta", delta, 0.0, float("inf"))
  check_range("lam", lam, 0.0, float("inf"))
  margins = policy_chosen_logps - policy_rejected_logps
  metrics = pair_metrics(
    policy_chosen_logps,
    policy_rejected_logps,
    policy_chosen_logps,
    policy_rejected_logps,
  )
  return LossOutput(
    jax.nn.relu(delta - margins) - lam * policy_chosen_logps, metrics
  )
