"""DPO-Positive: DPO with a penalty on losing the chosen response."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2402.13228")
def dpop(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.3,
  lam: float = 50.0,
) -> LossOutput:
  """DPO-Positive (Smaug), Pal et al. 2024 (2402.13228), eq. 3.

      -log sigmoid(beta * (h_w - h_l - lam * max(0, -h_w))),
      h = log pi(y|x) - log ref(y|x)

  The penalty acts as soon as the chosen response is less likely than under the
  reference: a margin bought by lowering both does not pay.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: larger keeps nearer to the reference.
    lam: the paper's lambda, the penalty in nats a lost nat; larger holds the
      chosen response up more, 0 is DPO.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("lam", lam, 0.0, float("inf"))
  chosen = policy_chosen_logps - reference_chosen_logps
  rejected = policy_rejected_logps - reference_rejected_logps
  penalty = jax.nn.relu(-chosen)
  metrics = pair_metrics(
    beta * chosen, beta * rejected, policy_chosen_logps, policy_rejected_logps
  )
  return LossOutput(
    binary_nll(beta * (chosen - rejected - lam * penalty)),
    metrics | {"chosen_loss_of_logps": penalty},
  )
