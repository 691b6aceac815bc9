"""DiscoPOP: a loss found by a language model's search over programs."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2406.08414", divergences=True)
def discopop(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.05,
  tau: float = 0.05,
) -> LossOutput:
  """Log-ratio modulated loss, Lu et al. 2024 (2406.08414), eq. 5.

      -(1 - m) log sigmoid(d) + m exp(-d),   m = sigmoid(d / tau),
      d = beta * (h_w - h_l),   h = log pi(y|x) - log ref(y|x)

  The logistic loss for pairs in the wrong order, the exponential one for the
  rest. Not convex: it has a local optimum at a slightly negative d, and at the
  reference (d = 0) its gradient points there, so a batch that is all ties first
  narrows margins. The product m exp(-d) is formed in log space; elsewhere it is
  NaN below d = -88. EasyDeL's tau is 1.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: larger keeps nearer to the reference.
    tau: width of the passage from one loss to the other, in rewards; larger
      mixes them over more pairs.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("tau", tau, 1e-9, float("inf"))
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  margins = chosen - rejected
  logistic = -jax.nn.log_sigmoid(margins) * jax.nn.sigmoid(-margins / tau)
  exponent = jax.nn.log_sigmoid(margins / tau) - margins
  # Only a tau above 1 lets the exponent grow at all.
  return LossOutput(
    logistic + jnp.exp(jnp.minimum(exponent, 80.0)),
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
