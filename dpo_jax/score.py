"""What a model says of every response of a batch, in one pass."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import logps
from dpo_jax.batch import Batch, Router, Scores
from dpo_jax.one_sweep import Given, Objective, one_sweep, slack

Place = Callable[[Any], Any]


class Score:
  """(variables, batch) -> scores of each response under one model: the one
  function that scores policy and reference alike."""

  def __init__(
    self,
    model: Any,
    *,
    tile: int = 1024,
    place_head: Place = lambda function: function,
    place_sweep: Place | None = lambda function: function,
    skip_prompts: bool = True,
  ):
    """Wraps a model.

    Args:
      model: with `apply(variables, tokens, positions, key_start, key_end,
        queries=i32[B S])` to hidden states f[B S D] of these tokens (f[B T D]
        of all, without queries), and `unembed(variables)` to f[V D]. Where it
        has them: `spread(variables)` prepares variables for the two;
        `logit_cap` bounds logits (`logps.capped`); with a true `router` it
        fills the collection of that name where it is mutable.
      tile: scored tokens whose logits are alive at once.
      place_head: wraps the head for a mesh (`sharding.Pins.head`).
      place_sweep: likewise head and loss together; None where that cannot be.
      skip_prompts: asks the last layer for scored tokens only.
    """
    self._model = model
    self._tile = tile
    self._cap = getattr(model, "logit_cap", None)
    self._spread = getattr(model, "spread", lambda variables: variables)
    self._place_head = place_head
    self._place_sweep = place_sweep
    self._skip_others = skip_prompts

  def __call__(
    self,
    variables: Any,
    batch: Batch,
    *,
    tails: bool = False,
    confidence: bool = False,
    router: bool = False,
    dropout: Any = None,
  ) -> Scores:
    """Scores a batch.

    Args:
      variables: of the model.
      batch: arrays as in `batch.Batch`.
      tails: also what lies beyond the shorter response's length.
      confidence: also confidences, see WPO.
      router: also how experts were used, where there are any.
      dropout: key for what adapters are not to see.

    Returns:
      `Scores` f32[B M K]; 0 for a response that is not there.
    """
    hidden, head, used = self._hidden(variables, batch, router, dropout)
    heads = self._heads(confidence, slack(batch))
    tokens, squares = heads(hidden, head, batch.target)
    scores = summed(tokens, batch, tails=tails, squares=squares)
    return scores._replace(router=used)

  def tokens(self, variables: Any, batch: Batch) -> jax.Array:
    """Log-probs of the scored tokens one by one, f32[B S]; what padding holds
    means nothing."""
    hidden, head, _ = self._hidden(variables, batch, False, None)
    return self._heads(False, slack(batch))(hidden, head, batch.target)[0]

  def sweeps(self, batch: Batch) -> bool:
    """Whether `objective` is to be had: whether it saves more than tiles that
    end with an example waste, half an example each."""
    rows, places, _ = batch.lengths.shape
    scored = batch.target.shape[1]
    fits = rows * scored <= self._tile or scored <= self._tile // 2 * places
    return self._place_sweep is not None and fits

  def objective(
    self,
    variables: Any,
    given: Given,
    objective: Objective,
    *,
    tails: bool = False,
    confidence: bool = False,
    dropout: Any = None,
  ) -> tuple[jax.Array, Any]:
    """A sum over examples, each by itself, of a function of their scores, whose
    gradient is taken in the head's one sweep; see `one_sweep`."""
    hidden, head, _ = self._hidden(variables, given.batch, False, dropout)
    sweep = one_sweep(
      objective,
      lambda tokens, batch, squares: summed(
        tokens, batch, tails=tails, squares=squares
      ),
      tile=self._tile, cap=self._cap, confidence=confidence,
    )  # fmt: skip
    return self._place_sweep(sweep)(hidden, head, given)

  def _hidden(self, variables, batch, router, dropout):
    """Hidden states f[B S D] of scored tokens, head, use of experts."""
    variables = self._spread(variables)
    scored = batch.slot < math.prod(batch.lengths.shape[1:])
    at = jnp.where(scored, batch.source, batch.tokens.shape[1])
    hidden, used = hidden_states(
      self._model, variables, batch, at,
      router=router, dropout=dropout, skip_others=self._skip_others,
    )  # fmt: skip
    return hidden, self._model.unembed(variables), used

  def _heads(self, confidence, slack):
    """(hidden f[B S D], head, target) -> log-probs, and squares or None."""
    function = logps.token_logps
    if confidence:
      function = logps.token_logps_and_squares

    def run(hidden, head, target):
      found = function(
        hidden.reshape(-1, hidden.shape[-1]), head, target.reshape(-1),
        # Tiles as in the one sweep, so that numbers are equal to the last bit.
        tile=self._tile, cap=self._cap, slack=slack,
      )  # fmt: skip
      return jax.tree.map(lambda x: x.reshape(target.shape), found)

    placed = self._place_head(run)
    return placed if confidence else lambda *args: (placed(*args), None)


def hidden_states(
  model: Any,
  variables: Any,
  batch: Batch,
  at: jax.Array,
  *,
  router: bool = False,
  dropout: Any = None,
  skip_others: bool = True,
) -> tuple[jax.Array, Router | None]:
  """Hidden states of some tokens of a batch, from one pass over its rows.

  Args:
    model: see `Score`.
    variables: of the model, spread.
    batch: arrays as in `batch.Batch`.
    at: i32[B S], index in the row; beyond the row for none.
    router: also how experts were used, where there are any.
    dropout: key for what adapters are not to see.
    skip_others: other tokens do not meet the last layer's queries and MLP.

  Returns:
    f[B S D], and the use of experts or None.
  """
  inputs = batch.tokens, batch.positions, batch.key_start, batch.key_end
  options = {} if dropout is None else {"rngs": {"dropout": dropout}}
  routed = getattr(model, "router", False)
  # How all tokens are routed may be asked for, in the last layer too, and
  # policy and reference are to be one computation.
  if skip_others and not routed:
    return model.apply(variables, *inputs, queries=at, **options), None
  used = None
  if router and routed:
    options["mutable"] = ["router"]
    hidden, sown = model.apply(variables, *inputs, **options)
    used = Router(**{name: x for name, (x,) in sown["router"].items()})
  else:
    hidden = model.apply(variables, *inputs, **options)
  at = jnp.minimum(at, hidden.shape[1] - 1)[..., None]
  return jnp.take_along_axis(hidden, at, axis=1), used


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
