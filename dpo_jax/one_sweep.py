"""Head, loss and their gradient in one sweep over the scored tokens.

The gradient of a log-softmax needs the logits again. Where an example's loss
stands alone, it is known as soon as its own tokens are scored, so the gradient
is taken while their logits are still there: three products with the head
instead of four, two where it is frozen, and nothing of the vocabulary's size is
kept but the gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import logps
from dpo_jax.batch import Batch, Scores

# (scores, of the reference, rows of the batch, further arrays) -> sum over the
# examples of these rows, and a tree of further sums.
Objective = Callable[..., tuple[jax.Array, Any]]


class Given(NamedTuple):
  """What the objective reads beside the policy's scores; no gradient."""

  batch: Batch
  reference: Scores | None
  everywhere: Any  # the same for all rows


def one_sweep(
  objective: Objective,
  summed: Callable[..., Scores],
  *,
  tile: int,
  cap: float | None = None,
  confidence: bool = False,
) -> Callable[[jax.Array, jax.Array, Given], tuple[jax.Array, Any]]:
  """The objective as a function of hidden states and head.

  Args:
    objective: a sum over examples, each by itself.
    summed: (token log-probs f32[B S], rows of the batch, squares f32[B S] or
      None) -> scores.
    tile: most scored tokens whose logits are alive at once, whole rows; at
      least the S of a row.
    cap: see `logps.token_logps`.
    confidence: also hands `squares` over.

  Returns:
    (hidden f[B S D], head f[V D], given) -> what the objective returns, over
    all rows. Differentiable by the first two.
  """

  def sweep(hidden, head, given, by_hidden, by_head):
    rows, scored, width = hidden.shape
    tiles, size = logps.tiling(rows * scored, tile, scored)
    split = _splitter(tiles, size // scored, rows)
    nowhere = math.prod(given.batch.lengths.shape[1:])
    # Zeros, which fill up the last tile, are to be nowhere.
    batch = given.batch._replace(slot=given.batch.slot - nowhere)
    parts = jax.tree.map(split, (hidden, (batch, given.reference)))

    def one_tile(dhead, part):
      h, (batch, reference) = part
      h = h.reshape(-1, width)
      batch = batch._replace(slot=batch.slot + nowhere)
      target = batch.target.reshape(-1)
      logits, lse, values = logps.score_tile(h, head, target, cap, confidence)
      tokens, *squares = (x.reshape(-1, scored) for x in values)

      def total(tokens):
        scores = summed(tokens, batch, squares[0] if squares else None)
        return objective(scores, reference, batch, given.everywhere)

      if not (by_hidden or by_head):
        return dhead, (*total(tokens), None)
      out, pull_back, sums = jax.vjp(total, tokens, has_aux=True)
      (g,) = pull_back(jnp.ones_like(out))
      dlogits = logps.by_logits(
        logits, lse, target, g.reshape(-1), cap, h.dtype
      )
      dh = logps.by_hidden(dlogits, head) if by_hidden else None
      if by_head:
        dhead += logps.by_head(dlogits, h)
      return dhead, (out, sums, dh)

    start = jnp.zeros(head.shape if by_head else (), jnp.float32)
    dhead, (out, sums, dh) = jax.lax.scan(one_tile, start, parts)
    out, sums = jax.tree.map(lambda x: x.sum(axis=0), (out, sums))
    if dh is not None:
      dh = dh.reshape(-1, scored, width)[:rows]
    return (out, sums), (dh, dhead.astype(head.dtype) if by_head else None)

  @jax.custom_vjp
  def run(hidden, head, given):
    return sweep(hidden, head, given, False, False)[0]

  def forward(hidden, head, given):
    moved = hidden.perturbed, head.perturbed
    given = jax.tree.map(lambda x: x.value, given, is_leaf=_is_primal)
    return sweep(hidden.value, head.value, given, *moved)

  def backward(gradients, g):
    total, _ = g
    scaled = jax.tree.map(lambda x: (x * total).astype(x.dtype), gradients)
    return *scaled, None

  run.defvjp(forward, backward, symbolic_zeros=True)
  return run


def _is_primal(x):
  return hasattr(x, "perturbed")


def _splitter(tiles, rows_a_tile, rows):
  """[B ...] -> [tiles, rows a tile, ...], zeros behind the last."""

  def split(x):
    short = tiles * rows_a_tile - rows
    x = jnp.pad(x, ((0, short),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(tiles, rows_a_tile, *x.shape[1:])

  return split
