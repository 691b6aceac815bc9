"""RSO's hinge: pairs beyond the margin have no gradient."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2309.06657", divergences=True)
def hinge(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.05,
) -> LossOutput:
  """Hinge loss of RSO, Liu et al. 2023 (2309.06657), eq. 10 ("hinge-norm").

      max(0, 1 - beta * (h_w - h_l)),   h = log pi(y|x) - log ref(y|x)

  It is SLiC's hinge on log-ratios to a reference; without reference and with
  its likelihood term that is `slic`, which others also call hinge.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: the paper's gamma, one over the margin in nats at which a pair is
      content; larger stops nearer to the reference.
  """
  check_range("beta", beta, 0.0, float("inf"))
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  return LossOutput(
    jax.nn.relu(1 - (chosen - rejected)),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
