"""Length-normalised DPO."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  mean_logps,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2411.15124", aggregation="mean", divergences=True)
def sigmoid_norm(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  *,
  beta: float = 5.0,
) -> LossOutput:
  """Length-normalised DPO of Tulu 3, Lambert et al. 2024 (2411.15124).

      -log sigmoid(beta * (h_w / |y_w| - h_l / |y_l|)),
      h = log pi(y|x) - log ref(y|x)

  A long response cannot win by many small differences. beta multiplies nats a
  token, hence the larger default. Logged rewards are beta times the summed h,
  as TRL logs them, and comparable with those of `dpo`.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    chosen_lengths: f[...].
    rejected_lengths: f[...].
    beta: larger keeps nearer to the reference.
  """
  check_range("beta", beta, 0.0, float("inf"))
  chosen = policy_chosen_logps - reference_chosen_logps
  rejected = policy_rejected_logps - reference_rejected_logps
  margins = mean_logps(chosen, chosen_lengths) - mean_logps(
    rejected, rejected_lengths
  )
  return LossOutput(
    binary_nll(beta * margins),
    pair_metrics(
      beta * chosen, beta * rejected, policy_chosen_logps, policy_rejected_logps
    ),
  )
