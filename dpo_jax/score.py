"""Log-probs of every response of a batch under one model, in one pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import logps
from dpo_jax.batch import Batch

# (variables, batch) -> f32[B M 2]
Score = Callable[[Any, Batch], jax.Array]


def make_score(
  model: Any,
  *,
  tile: int = 1024,
  place_head: Callable[[Any], Any] = lambda function: function,
) -> Score:
  """The one function that scores policy and reference alike.

  Args:
    model: with `apply(variables, tokens, positions, key_start, key_end)` to
      hidden states f[B T D], and `unembed(variables)` to f[V D].
    tile: rows of logits alive at once.
    place_head: wraps the head for a mesh (`sharding.Pins.head`).

  Returns:
    `score(variables, batch)`: summed log-probs f32[B M 2] of each example's
    two branches, 0 for a branch that is not there.
  """

  def head(hidden, unembed, target):
    flat = hidden.reshape(-1, hidden.shape[-1])
    scored = logps.token_logps(flat, unembed, target.reshape(-1), tile=tile)
    return scored.reshape(target.shape)

  head = place_head(head)

  def score(variables: Any, batch: Batch) -> jax.Array:
    hidden = model.apply(
      variables, batch.tokens, batch.positions, batch.key_start, batch.key_end
    )
    # Before the unembedding: prompts and padding never meet the vocabulary.
    hidden = jnp.take_along_axis(hidden, batch.source[..., None], axis=1)
    token_logps = head(hidden, model.unembed(variables), batch.target)
    return logps.sum_by_slot(token_logps, batch.slot, batch.weights.shape[1])

  return score
