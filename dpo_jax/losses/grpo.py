"""GRPO: PPO whose baseline is the mean reward of a group of answers."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import (
  LossOutput,
  Sums,
  at_least_float32,
  check_choice,
  check_range,
)
from dpo_jax.losses.kl import kl_estimate
from dpo_jax.losses.ppo import clipped_surrogate


def group_advantages(
  rewards: jax.Array, scale: str = "group", mask: jax.Array | None = None
) -> jax.Array:
  """How much better an answer is than the others to its prompt.

  Shao et al. 2024 (2402.03300), section 4.1.2: reward less the group's mean,
  over a standard deviation (the unbiased one, and 1e-4 is added, as in TRL).

  Args:
    rewards: f[N G], G answers to each of N prompts.
    scale: "group", as there; "batch" divides by the deviation of all rewards
      (2508.08221); "none" divides by nothing (Dr. GRPO, 2503.20783).
    mask: bool or 0/1 [N G], answers that have a reward; the others are as if
      they had not been given. None: all have.

  Returns:
    f32[N G]; exactly 0 in a group whose rewards are equal, or that has but one,
    and outside the mask.

  Raises:
    ValueError: no such scale.
  """
  check_choice("scale", scale, "group", "batch", "none")
  rewards = at_least_float32(rewards)
  mask = jnp.broadcast_to(True if mask is None else mask, rewards.shape)
  mask = mask.astype(bool)
  inf = jnp.inf
  low = jnp.where(mask, rewards, inf).min(axis=-1, keepdims=True)
  high = jnp.where(mask, rewards, -inf).max(axis=-1, keepdims=True)

  def from_mean(axes):
    """Distance from the mean over these, 0 outside the mask, and a count."""
    count = mask.sum(axis=axes, keepdims=True)
    total = jnp.where(mask, rewards, 0.0).sum(axis=axes, keepdims=True)
    return jnp.where(mask, rewards - total / jnp.maximum(count, 1), 0.0), count

  better = jnp.where(high > low, from_mean(-1)[0], 0.0)
  if scale == "none":
    return better
  axes = -1 if scale == "group" else None
  distance, count = from_mean(axes)
  squares = (distance**2).sum(axis=axes, keepdims=True)
  return better / (jnp.sqrt(squares / jnp.maximum(count - 1, 1)) + 1e-4)


def grpo(
  logps: jax.Array,
  old_logps: jax.Array,
  reference_logps: jax.Array | None,
  advantages: jax.Array,
  *,
  beta: float = 0.0,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  level: str = "token",
  mask: jax.Array | None = None,
) -> LossOutput:
  """GRPO, Shao et al. 2024 (2402.03300), eq. 3, negated, by token.

      -min(u A, clip(u, 1 - clip_low, 1 + clip_high) A) + beta * k3

  u = pi / pi_old and k3 = ref/pi - 1 - log(ref/pi) of a token. A larger
  clip_high leaves room for rare tokens (DAPO, 2503.14476). With level
  "sequence" u is the geometric mean over the response (GSPO, 2507.18071); on
  rows where several responses lie, give means of log-probs of responses in
  place of tokens.

  k3 in the loss pulls as KL(ref || pi) does (see `kl_estimate`): the optimum
  is not ref exp(r / beta) / Z but that of the forward KL.

  Args:
    logps: f[...], log pi of each drawn token.
    old_logps: f[...], under the policy that drew it; a constant.
    reference_logps: f[...]; None if beta is 0.
    advantages: f[...], or anything that broadcasts, as [N 1]; a constant.
    beta: weight of the KL; TRL's default of 0 has none.
    clip_low: in [0, 1].
    clip_high: from 0 on.
    level: "token" or "sequence".
    mask: bool or 0/1 [N R], for level "sequence": tokens of the response.

  Returns:
    Loss by token, to be reduced by `token_sums`; metrics under TRL's names.

  Raises:
    ValueError: an option is out of range, or what it needs is missing.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("clip_low", clip_low, 0.0, 1.0)
  check_range("clip_high", clip_high, 0.0, float("inf"))
  check_choice("level", level, "token", "sequence")
  logps = at_least_float32(logps)
  log_ratio = logps - jax.lax.stop_gradient(at_least_float32(old_logps))
  if level == "sequence":
    log_ratio = _sequence_mean(log_ratio, mask)
  advantages = jax.lax.stop_gradient(at_least_float32(advantages))
  advantages = jnp.broadcast_to(advantages, log_ratio.shape)
  loss, clipped, ratio = clipped_surrogate(
    log_ratio, advantages, clip_low, clip_high
  )
  metrics = {
    "clip_ratio/low_mean": clipped * (advantages < 0),
    "clip_ratio/high_mean": clipped * (advantages > 0),
    "clip_ratio/region_mean": clipped,
    "ratio": ratio,
  }
  if beta != 0:
    if reference_logps is None:
      raise ValueError(f"beta={beta} needs reference_logps")
    kl = kl_estimate(logps, reference_logps, "k3")
    loss, metrics["kl"] = loss + beta * kl, kl
  return LossOutput(loss, metrics)


def token_sums(
  loss: jax.Array,
  mask: jax.Array,
  lengths: jax.Array,
  *,
  reduction: str = "dapo",
  max_tokens: int | None = None,
) -> Sums:
  """A loss by token as a mean over responses or tokens, not yet divided.

      grpo             mean over responses of the mean over a response's tokens
      bnpo, dapo       mean over all tokens (2503.14476)
      dr_grpo          sum over tokens / max_tokens, mean over responses: no
                       response is favoured for its length (2503.20783)

  Sums of microbatches and devices add up, so that bnpo and dapo, which TRL
  tells apart by whether the tokens are those of one of them or of all, are the
  same here.

  Args:
    loss: f[...].
    mask: bool or 0/1 [...], scored tokens.
    lengths: [...] or what broadcasts, as [N 1]: scored tokens of the response
      that the token belongs to; not read outside the mask.
    reduction: one of those.
    max_tokens: of any response; dr_grpo needs it.

  Raises:
    ValueError: no such reduction, or dr_grpo without max_tokens.
  """
  check_choice("reduction", reduction, "grpo", "bnpo", "dapo", "dr_grpo")
  mask = jnp.broadcast_to(jnp.asarray(mask, bool), loss.shape)
  loss = jnp.where(mask, loss, 0.0)
  if reduction in ("bnpo", "dapo"):
    return Sums(loss.sum(), mask.sum().astype(loss.dtype))
  share = jnp.where(mask, 1.0 / jnp.maximum(lengths, 1), 0.0)
  share = share.astype(loss.dtype)
  if reduction == "grpo":
    return Sums((loss * share).sum(), share.sum())
  if max_tokens is None:
    raise ValueError("reduction='dr_grpo' needs max_tokens")
  return Sums(loss.sum(), share.sum() * max_tokens)


def _sequence_mean(log_ratio, mask):
  if mask is None:
    raise ValueError("level='sequence' needs mask, the tokens of each response")
  mask = jnp.broadcast_to(jnp.asarray(mask, bool), log_ratio.shape)
  total = jnp.where(mask, log_ratio, 0.0).sum(axis=-1, keepdims=True)
  mean = total / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
  return jnp.broadcast_to(mean, log_ratio.shape)
