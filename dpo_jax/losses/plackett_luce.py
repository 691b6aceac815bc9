"""DPO on whole rankings: Plackett-Luce instead of Bradley-Terry."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import LossOutput, Weighted, check_range
from dpo_jax.losses.registry import register


@register(paper="2305.18290")
def plackett_luce(
  policy_ranked_logps: jax.Array,
  reference_ranked_logps: jax.Array,
  ranked_lengths: jax.Array,
  *,
  beta: float = 0.1,
) -> LossOutput:
  """Listwise DPO, Rafailov et al. 2023 (2305.18290), eq. 20.

      -sum_k log( exp(r_k) / sum_{j >= k} exp(r_j) ),
      r = beta * (log pi(y|x) - log ref(y|x)),   y_1 the best of K responses

  The likelihood of a ranking under Plackett-Luce; the partition function
  cancels as it does in a pair, and K = 2 is `dpo`. Rankings of different
  lengths share an array: a response of length 0 is none, and must come last.

  Args:
    policy_ranked_logps: f[... K], the best response first.
    reference_ranked_logps: f[... K].
    ranked_lengths: f[... K].
    beta: larger keeps nearer to the reference.
  """
  check_range("beta", beta, 0.0, float("inf"))
  there = ranked_lengths > 0
  # The best response is never left out, or there would be nothing to divide by.
  there = there.at[..., 0].set(True)
  logratios = jnp.where(
    there, policy_ranked_logps - reference_ranked_logps, 0.0
  )
  rewards = beta * logratios
  k = rewards.shape[-1]
  rest = there[..., None, :] & (jnp.arange(k) >= jnp.arange(k)[:, None])
  # A finite hole: exp of it is 0 beside any reward, and its gradient no NaN.
  open_rewards = jnp.where(rest, rewards[..., None, :], -1e30)
  normalizer = jax.nn.logsumexp(open_rewards, axis=-1)
  nll = jnp.where(there, normalizer - rewards, 0.0).sum(axis=-1)
  last = jnp.where(there, jnp.arange(k), 0).max(axis=-1, keepdims=True)
  last = jnp.take_along_axis(rewards, last, axis=-1)[..., 0]
  return LossOutput(
    nll,
    {
      "rewards/chosen": rewards[..., 0],
      "rewards/rejected": last,
      "rewards/margins": rewards[..., 0] - last,
      "rewards/accuracies": Weighted(*_ordered_pairs(rewards, there)),
      "logps/chosen": policy_ranked_logps[..., 0],
    },
  )


def _ordered_pairs(rewards, there):
  """Share of the pairs of a ranking whose rewards have its order, ties half,
  and whether it has a pair."""
  k = rewards.shape[-1]
  right = 0.5 * (1 + jnp.sign(rewards[..., :, None] - rewards[..., None, :]))
  pair = there[..., :, None] & there[..., None, :]
  pair &= jnp.arange(k)[:, None] < jnp.arange(k)
  pairs = pair.sum(axis=(-2, -1)).astype(rewards.dtype)
  share = jnp.where(pair, right, 0.0).sum(axis=(-2, -1)) / jnp.maximum(pairs, 1)
  return share, jnp.minimum(pairs, 1)
