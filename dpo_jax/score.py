"""What a model says of every response of a batch, in one pass."""

from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp

from dpo_jax import logps
from dpo_jax.batch import Batch, Router, Scores


class Score(Protocol):
  """(variables, batch) -> scores of each response under one model."""

  def __call__(
    self,
    variables: Any,
    batch: Batch,
    *,
    tails: bool = False,
    confidence: bool = False,
    router: bool = False,
    dropout: Any = None,
  ) -> Scores: ...


def make_score(
  model: Any,
  *,
  tile: int = 1024,
  place_head: Callable[[Any], Any] = lambda function: function,
) -> Score:
  """The one function that scores policy and reference alike.

  Args:
    model: with `apply(variables, tokens, positions, key_start, key_end)` to
      hidden states f[B T D], and `unembed(variables)` to f[V D]. Where it has
      them: `spread(variables)` prepares variables for the two; `logit_cap`
      bounds logits (`logps.capped`); with a true `router` it fills the
      collection of that name where it is mutable.
    tile: rows of logits alive at once.
    place_head: wraps the head for a mesh (`sharding.Pins.head`).

  Returns:
    `score(variables, batch)`: `Scores` f32[B M K]; 0 for a response that is
    not there. `tails`, `confidence` and `router` ask for these as well; a
    model without experts has no `router`. `dropout` is a key for what adapters
    are not to see.
  """

  cap = getattr(model, "logit_cap", None)
  spread = getattr(model, "spread", lambda variables: variables)

  def on_rows(head):
    def run(hidden, unembed, target):
      flat = hidden.reshape(-1, hidden.shape[-1])
      found = head(flat, unembed, target.reshape(-1), tile=tile, cap=cap)
      if isinstance(found, tuple):
        return tuple(x.reshape(target.shape) for x in found)
      return found.reshape(target.shape)

    return place_head(run)

  plain = on_rows(logps.token_logps)
  with_squares = on_rows(logps.token_logps_and_squares)

  def score(
    variables: Any,
    batch: Batch,
    *,
    tails: bool = False,
    confidence: bool = False,
    router: bool = False,
    dropout: Any = None,
  ) -> Scores:
    variables = spread(variables)
    inputs = batch.tokens, batch.positions, batch.key_start, batch.key_end
    options = {} if dropout is None else {"rngs": {"dropout": dropout}}
    used = None
    if router and getattr(model, "router", False):
      options["mutable"] = ["router"]
      hidden, sown = model.apply(variables, *inputs, **options)
      used = Router(**{name: x for name, (x,) in sown["router"].items()})
    else:
      hidden = model.apply(variables, *inputs, **options)
    # Before the unembedding: prompts and padding never meet the vocabulary.
    hidden = jnp.take_along_axis(hidden, batch.source[..., None], axis=1)
    unembed = model.unembed(variables)
    if confidence:
      tokens, squares = with_squares(hidden, unembed, batch.target)
    else:
      tokens, squares = plain(hidden, unembed, batch.target), None
    scores = summed(tokens, batch, tails=tails, squares=squares)
    return scores._replace(router=used)

  return score


def summed(
  token_logps: Any, batch: Batch, *, tails: bool = False, squares: Any = None
) -> Scores:
  """Scores of responses from those of their tokens.

  Args:
    token_logps: f32[B S], at the scored tokens.
    batch: where these belong.
    tails: also sum what lies beyond the shorter response's length.
    squares: f32[B S], log sum_v p(v)^2, to get confidences; None gets none.
  """
  shape, lengths = batch.lengths.shape[1:], batch.lengths
  sums = logps.sum_by_slot(token_logps, batch.slot, shape)
  tail = certain = None
  if tails:
    shorter = jnp.broadcast_to(lengths.min(-1, keepdims=True), lengths.shape)
    far = logps.beyond(batch.slot, shorter)
    tail = logps.sum_by_slot(
      jnp.where(far, token_logps, 0.0), batch.slot, shape
    )
  if squares is not None:
    aligned = logps.sum_by_slot(token_logps - squares, batch.slot, shape)
    certain = aligned / jnp.maximum(lengths, 1)
  return Scores(sums, tail, certain)
