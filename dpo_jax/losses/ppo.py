"""PPO: clipped steps of a policy and of its value model."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import (
  LossOutput,
  at_least_float32,
  check_range,
  tame_exp,
)
from dpo_jax.losses.kl import kl_estimate


def ppo_policy(
  logps: jax.Array,
  old_logps: jax.Array,
  advantages: jax.Array,
  *,
  clip: float = 0.2,
) -> LossOutput:
  """Clipped surrogate, Schulman et al. 2017 (1707.06347), eq. 7, negated.

      -min(u A, clip(u, 1 - clip, 1 + clip) A),   u = pi / pi_old

  By token; reduce it with the response mask as weights. Where pi is pi_old the
  gradient is that of -A log pi. u goes on linearly beyond e^30, so that one
  token far off leaves loss and gradient finite.

  Args:
    logps: f[...], log pi of each drawn token.
    old_logps: f[...], under the policy that drew it; a constant.
    advantages: f[...]; a constant.
    clip: how far u may go, above 0.

  Returns:
    Loss by token; metrics under TRL's names: the ratio, half the squared
    log-ratio (an estimate of KL(pi_old || pi)) and the share that is clipped.

  Raises:
    ValueError: clip is negative.
  """
  check_range("clip", clip, 0.0, float("inf"))
  log_ratio = _log_ratio(logps, old_logps)
  advantages = jax.lax.stop_gradient(at_least_float32(advantages))
  loss, clipped, ratio = clipped_surrogate(log_ratio, advantages, clip, clip)
  return LossOutput(
    loss,
    {
      "policy/approxkl_avg": 0.5 * log_ratio**2,
      "policy/clipfrac_avg": clipped,
      "val/ratio": ratio,
    },
  )


def ppo_value(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  *,
  clip: float = 0.2,
) -> LossOutput:
  """Half the squared error of values that stay within `clip` of the old ones.

      max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2

  That of the authors' code (not in the paper) and of TRL. By token.

  Args:
    values: f[...], V.
    old_values: f[...], V when the tokens were drawn; a constant.
    returns: f[...], R; a constant.
    clip: in units of reward; inf is the plain squared error.

  Raises:
    ValueError: clip is negative.
  """
  if clip != float("inf"):
    check_range("clip", clip, 0.0, float("inf"))
  values = at_least_float32(values)
  old, returns = map(
    jax.lax.stop_gradient, map(at_least_float32, (old_values, returns))
  )
  free = (values - returns) ** 2
  held = (jnp.clip(values, old - clip, old + clip) - returns) ** 2
  return LossOutput(
    0.5 * jnp.maximum(free, held),
    {"val/clipfrac_avg": (held > free).astype(free.dtype)},
  )


def shaped_rewards(
  scores: jax.Array,
  logps: jax.Array,
  reference_logps: jax.Array,
  lengths: jax.Array,
  coefficient: jax.Array | float,
  kind: str = "k1",
) -> jax.Array:
  """Reward of each token: its KL's price, and at the last one the score.

  With k1 the sum over a response is score - coefficient * log(pi / ref), whose
  mean is the objective of 2305.18290, eq. 3.

  Args:
    scores: f[N], of each response.
    logps: f[N R], under the policy that drew them, finite everywhere.
    reference_logps: f[N R].
    lengths: i[N], tokens of each response; one without tokens gets nothing.
    coefficient: f[], price of a nat.
    kind: as of `kl_estimate`.

  Returns:
    f32[N R], 0 beyond the lengths.
  """
  price = coefficient * kl_estimate(logps, reference_logps, kind)
  place, lengths = jnp.arange(price.shape[-1]), lengths[..., None]
  scores = at_least_float32(scores)[..., None]
  rewards = jnp.where(place < lengths, -price, 0.0)
  return rewards + jnp.where(place == lengths - 1, scores, 0.0)


def clipped_surrogate(
  log_ratio: jax.Array, advantages: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-min(u A, clip(u, 1 - low, 1 + high) A), where that was clipped, and u."""
  ratio = tame_exp(log_ratio)
  free = -ratio * advantages
  held = -jnp.clip(ratio, 1 - low, 1 + high) * advantages
  return jnp.maximum(free, held), (held > free).astype(free.dtype), ratio


def _log_ratio(logps, old_logps):
  old_logps = jax.lax.stop_gradient(at_least_float32(old_logps))
  return at_least_float32(logps) - old_logps
