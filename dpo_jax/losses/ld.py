"""LD-DPO: what a response says beyond the other one's length counts less."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import at_least_float32


def desensitize(
  logps: jax.Array, tail_logps: jax.Array, ld_alpha: float
) -> jax.Array:
  """Length-desensitised log-prob, Liu et al. 2024 (2409.06411).

      log p(head) + ld_alpha * log p(tail)

  The head is as long as the shorter response of the pair. `ld_alpha` = 1
  changes nothing, 0 leaves the tail out. It goes to policy and reference alike,
  as in TRL from 0.29 on; others desensitise the policy only.

  Args:
    logps: f[...], of the whole response.
    tail_logps: f[...], the tail's part of it.
    ld_alpha: in [0, 1].
  """
  return logps - (1 - ld_alpha) * tail_logps


def tail_logps(
  token_logps: jax.Array, mask: jax.Array, other_lengths: jax.Array
) -> jax.Array:
  """Log-prob of the tokens beyond the other response's length.

  Args:
    token_logps: f[... T].
    mask: bool or 0/1 [... T], response tokens.
    other_lengths: [...], tokens of the other response of the pair.

  Returns:
    f[...].
  """
  mask, token_logps = mask.astype(bool), at_least_float32(token_logps)
  beyond = jnp.cumsum(mask, axis=-1) > other_lengths[..., None]
  return jnp.where(mask & beyond, token_logps, 0.0).sum(axis=-1)
