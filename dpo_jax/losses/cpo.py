"""CPO: DPO against a flat reference, held by a likelihood term."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  mean_logps,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2401.08417")
def cpo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  *,
  beta: float = 0.1,
  alpha: float = 1.0,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """Contrastive Preference Optimization, Xu et al. 2024 (2401.08417), eq. 3
  and 5.

      -log sigmoid(beta * (log pi(y_w|x) - log pi(y_l|x))) + alpha * NLL(y_w|x)

  The first term is DPO's with a reference that gives every response the same
  probability; the second keeps the policy near good responses. The NLL is a
  mean over the chosen response's tokens, each example counting once; the
  paper's formula has the sum, TRL the mean over all tokens of the batch.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    chosen_lengths: f[...].
    beta: larger lets a pair be content with a smaller difference.
    alpha: larger imitates the chosen response more.
    label_smoothing: in [0, 0.5], as in `dpo`.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("alpha", alpha, 0.0, float("inf"))
  check_range("label_smoothing", label_smoothing, 0.0, 0.5)
  chosen, rejected = beta * policy_chosen_logps, beta * policy_rejected_logps
  nll = -mean_logps(policy_chosen_logps, chosen_lengths)
  metrics = pair_metrics(
    chosen, rejected, policy_chosen_logps, policy_rejected_logps
  )
  return LossOutput(
    binary_nll(chosen - rejected, label_smoothing) + alpha * nll,
    metrics | {"nll_loss": nll},
  )
