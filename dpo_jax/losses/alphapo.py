"""AlphaPO: SimPO with a reward of another shape than the logarithm."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import (
  LossOutput,
  binary_nll,
  check_range,
  mean_logps,
  pair_metrics,
  tame_expm1,
)
from dpo_jax.losses.registry import register


def shaped_reward(mean_logps: jax.Array, alpha: float) -> jax.Array:
  """(1 - p^-alpha) / alpha of p = exp(mean_logps), f[...] -> f[...].

  Formed from the logarithm, since p itself underflows below -104 nats; beyond
  p^-alpha = e^30 it goes on linearly. alpha = 0 is log p.
  """
  near = jnp.abs(alpha) < 1e-6
  safe = jnp.where(near, 1.0, alpha)
  return jnp.where(near, mean_logps, -tame_expm1(-safe * mean_logps) / safe)


@register(paper="2501.03884", aggregation="mean")
def alphapo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  *,
  beta: float = 2.5,
  gamma: float = 0.1,
  alpha: float = 0.25,
) -> LossOutput:
  """AlphaPO, Gupta et al. 2025 (2501.03884).

      -log sigmoid(beta * (s_w - s_l) - gamma),
      s = (1 - p^-alpha) / alpha,   p = exp(log pi(y|x) / |y|)

  alpha = 0 is SimPO. TRL computes p and then its power, which is infinite for
  unlikely responses.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    chosen_lengths: f[...].
    rejected_lengths: f[...].
    beta: larger is content with a smaller difference.
    gamma: target margin of the rewards beta * s; larger asks for more.
    alpha: shape of the reward; the larger, the more unlikely responses weigh.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("gamma", gamma, 0.0, float("inf"))
  check_range("alpha", alpha, -10.0, 10.0)
  chosen, rejected = (
    beta * shaped_reward(mean_logps(logps, lengths), alpha)
    for logps, lengths in (
      (policy_chosen_logps, chosen_lengths),
      (policy_rejected_logps, rejected_lengths),
    )
  )
  return LossOutput(
    binary_nll(chosen - rejected - gamma),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
