"""AOT: the distribution of margins made to dominate that of the reference."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  pair_metrics,
)
from dpo_jax.losses.registry import register


def quantile_partners(
  mine: jax.Array, other: jax.Array, weights: jax.Array | None
) -> jax.Array:
  """For each entry of `mine` the entry of `other` of the same rank.

  Subtracted from `mine` this is the difference of the two sorted arrays, put
  back into the order of `mine`, so that it stays beside its own weight.

  Args:
    mine: f[...].
    other: f[...], differentiable.
    weights: f[...], 0 where an entry holds no example: such entries are ranked
      last in both, apart from the rest. None: all hold one.
  """
  shape = mine.shape
  mine, other = mine.reshape(-1), other.reshape(-1)
  empty = jnp.zeros(mine.shape, bool)
  if weights is not None:
    empty = weights.reshape(-1) <= 0

  def order(x):
    # Stable, empty entries last whatever they hold.
    return jnp.lexsort((jnp.where(empty, 0.0, x), empty))

  ranks = jnp.argsort(order(mine))
  return other[order(other)][ranks].reshape(shape)


@register(paper="2406.05882")
def aot(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  weights: jax.Array | None = None,
  *,
  beta: float = 0.01,
  label_smoothing: float = 0.0,
) -> LossOutput:
  """Alignment via Optimal Transport, Melnyk et al. 2024 (2406.05882), paired.

      mean_k -log sigmoid(beta * (u_(k) - v_(k))),
      u = log pi(y_w|x) - log pi(y_l|x),   v the same under the reference

  u_(k) is the k-th smallest of the whole batch: the margins of the policy are
  to dominate those of the reference in distribution, not pair by pair. The
  batch is the global one, on any number of devices and under accumulation; a
  larger batch gives a better estimate. The loss of a rank is reported at the
  pair that has this rank under the policy, where TRL sorts the losses.

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
  policy = policy_chosen_logps - policy_rejected_logps
  reference = reference_chosen_logps - reference_rejected_logps
  gap = policy - quantile_partners(policy, reference, weights)
  return LossOutput(
    binary_nll(beta * gap, label_smoothing),
    pair_metrics(
      beta * (policy_chosen_logps - reference_chosen_logps),
      beta * (policy_rejected_logps - reference_rejected_logps),
      policy_chosen_logps,
      policy_rejected_logps,
    ),
  )
