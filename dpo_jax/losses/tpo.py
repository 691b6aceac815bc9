"""TPO: a pair to prefer and a third, better response to imitate."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  mean_logps,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2405.16681")
def tpo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  policy_gold_logps: jax.Array,
  gold_lengths: jax.Array,
  *,
  beta: float = 0.01,
  alpha: float = 1.0,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """Triple Preference Optimization, Saeidi et al. 2024 (2405.16681).

      -log sigmoid(beta * (log pi(y_w|x) - log pi(y_l|x))) + alpha * NLL(y_g|x)

  y_g is the gold response, preferred to both; three ranked responses of one
  prompt are what it trains on. The NLL is a mean over the gold response's
  tokens, each example counting once, where TRL's is over all tokens of the
  batch. The length-normalised form is `tpo_l`.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    policy_gold_logps: f[...].
    gold_lengths: f[...].
    beta: larger lets a pair be content with a smaller difference.
    alpha: larger imitates the gold response more.
    label_smoothing: in [0, 0.5], as in `dpo`.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("alpha", alpha, 0.0, float("inf"))
  check_range("label_smoothing", label_smoothing, 0.0, 0.5)
  chosen, rejected = beta * policy_chosen_logps, beta * policy_rejected_logps
  nll = -mean_logps(policy_gold_logps, gold_lengths)
  metrics = pair_metrics(
    chosen, rejected, policy_chosen_logps, policy_rejected_logps
  )
  return LossOutput(
    binary_nll(chosen - rejected, label_smoothing) + alpha * nll,
    metrics | {"nll_loss": nll},
  )
