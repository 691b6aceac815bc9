"""From rewards and values of tokens to advantages."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import at_least_float32, check_range


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (1506.02438, eq. 16).

      A_t = d_t + gamma * lam * A_{t+1},   d_t = r_t + gamma * V_{t+1} - V_t

  Nothing follows a response's last token: V and A are 0 there. lam = 1 gives
  what is still to come less V_t, lam = 0 the error of one step.

  Args:
    rewards: f[N R], of each token.
    values: f[N R], what the value model expects before the token is known.
    mask: bool or 0/1 [N R], tokens of the response. What it leaves out has no
      part, also in the middle: the tokens around are then neighbours.
    gamma: discount a token, in [0, 1].
    lam: in [0, 1].

  Returns:
    Advantages and returns (advantage plus value), f32[N R] each; 0 outside the
    mask. No gradient flows through them.

  Raises:
    ValueError: gamma or lam is out of range.
  """
  check_range("gamma", gamma, 0.0, 1.0)
  check_range("lam", lam, 0.0, 1.0)
  rewards, values = at_least_float32(rewards), at_least_float32(values)
  mask = jnp.broadcast_to(jnp.asarray(mask, bool), rewards.shape)

  def earlier(later, token):
    next_value, next_advantage = later
    reward, value, there = token
    error = reward + gamma * next_value - value
    advantage = error + gamma * lam * next_advantage
    keep = lambda new, old: jnp.where(there, new, old)
    kept = (keep(value, next_value), keep(advantage, next_advantage))
    return kept, keep(advantage, 0.0)

  nothing = jnp.zeros(rewards.shape[:-1], (rewards + values).dtype)
  by_time = lambda x: jnp.moveaxis(x, -1, 0)
  _, advantages = jax.lax.scan(
    earlier,
    (nothing, nothing),
    (by_time(rewards), by_time(values), by_time(mask)),
    reverse=True,
  )
  advantages = jnp.moveaxis(advantages, 0, -1)
  returns = jnp.where(mask, advantages + values, 0.0)
  return jax.lax.stop_gradient((advantages, returns))


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Divides by the standard deviation over all that the mask holds.

  The variance is the unbiased one, and 1e-8 is added to it, as in TRL. Fewer
  than two entries have a variance of 0.

  Args:
    x: f[...].
    mask: bool or 0/1 [...].
    shift_mean: False leaves the mean where it was, as one does with rewards.

  Returns:
    f32[...], 0 outside the mask.
  """
  x = at_least_float32(x)
  mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
  count = mask.sum()
  sum_up = lambda y: jnp.where(mask, y, 0.0).sum()
  mean = sum_up(x) / jnp.maximum(count, 1)
  variance = sum_up((x - mean) ** 2) / jnp.maximum(count - 1, 1)
  white = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
  return jnp.where(mask, white if shift_mean else white + mean, 0.0)
