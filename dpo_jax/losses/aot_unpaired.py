"""AOT without the pairing: chosen rewards dominate rejected ones."""

import jax

from dpo_jax.losses.aot import quantile_partners
from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2406.05882")
def aot_unpaired(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  weights: jax.Array | None = None,
  *,
  beta: float = 0.01,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """Alignment via Optimal Transport, Melnyk et al. 2024 (2406.05882), unpaired.

      mean_k -log sigmoid(beta * (h_w(k) - h_l(k))),
      h = log pi(y|x) - log ref(y|x)

  h_w(k) is the k-th smallest over the chosen responses of the whole batch,
  h_l(k) over the rejected ones: which belongs to which prompt is not used, so
  there must be as many of one as of the other and the data are given as pairs.
  The batch is the global one, on any number of devices and under accumulation.
  TRL before 1.0 called it `aot_pair`.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    weights: f[...], 0 where an entry holds no example and must not be ranked.
    beta: larger keeps nearer to the reference.
    label_smoothing: in [0, 0.5], as in `dpo`.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("label_smoothing", label_smoothing, 0.0, 0.5)
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  gap = chosen - quantile_partners(chosen, rejected, weights)
  return LossOutput(
    binary_nll(gap, label_smoothing),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
