"""WPO: pairs weighted by how likely the policy itself would write them."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import at_least_float32


def wpo_weights(
  chosen_confidence: jax.Array, rejected_confidence: jax.Array
) -> jax.Array:
  """Weight of a pair, Zhou et al. 2024 (2406.11827), eq. 2, aligned form.

      w(y_w) * w(y_l),   w(y) = exp(mean_t log(pi(y_t) / sum_v pi(v)^2))

  Off-policy responses count less. Without gradient, and not clamped, as in the
  paper and TRL from 0.29 on; the authors' code keeps it at most 1.

  Args:
    chosen_confidence: f[...], see `confidence`.
    rejected_confidence: f[...].
  """
  return jax.lax.stop_gradient(jnp.exp(chosen_confidence + rejected_confidence))


def confidence(
  token_logps: jax.Array, token_log_sum_sq: jax.Array, mask: jax.Array
) -> jax.Array:
  """Mean over the response's tokens of log(pi(y_t) / sum_v pi(v)^2).

  Args:
    token_logps: f[... T], log pi(y_t).
    token_log_sum_sq: f[... T], log sum_v pi(v)^2 at the same positions.
    mask: bool or 0/1 [... T], response tokens.

  Returns:
    f[...], without gradient; 0 for a response without tokens.
  """
  aligned = at_least_float32(token_logps) - at_least_float32(token_log_sum_sq)
  aligned = jnp.where(mask.astype(bool), aligned, 0.0)
  mean = aligned.sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)
  return jax.lax.stop_gradient(mean)
