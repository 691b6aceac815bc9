"""Head, loss and their gradient in one sweep over the scored tokens.

The gradient of a log-softmax needs the logits again. Where an example's loss
stands alone, it is known as soon as its own tokens are scored, so the gradient
is taken while their logits are still there: three products with the head
instead of four, two where it is frozen, and nothing of the vocabulary's size is
kept but the gradient.

A tile begins and ends with an example, so how many there are depends on the
batch. An example that no tile holds is scored first, and its logits are
computed again.
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
    objective: a sum over examples, each by itself. Called with some rows of
      the batch, in which the weights of others are 0; of the batch it may read
      `lengths`, `weights`, `desirable` and `margins`.
    summed: (token log-probs f32[B S], rows of the batch, squares f32[B S] or
      None) -> scores; of the batch it may read `slot` and `lengths`.
    tile: most scored tokens whose logits are alive at once.
    cap: see `logps.token_logps`.
    confidence: also hands `squares` over.

  Returns:
    (hidden f[B S D], head f[V D], given) -> what the objective returns, over
    all rows. Differentiable by the first two.
  """

  def sweep(hidden, head, given, by_hidden, by_head):
    shape = hidden.shape
    packed = _Packed(given, shape[1], tile)
    size = packed.size
    hidden = packed.flat(hidden)
    targets = packed.flat(given.batch.target)

    def score(at):
      h = jax.lax.dynamic_slice_in_dim(hidden, at, size)
      y = jax.lax.dynamic_slice_in_dim(targets, at, size)
      logits, lse, values = logps.score_tile(h, head, y, cap, confidence)
      return values, (h, y, logits, lse)

    def judge(first, stop, values):
      """Sums of some examples, and their gradient by token log-probs f32[N]."""
      rows = packed.rows_of(first, stop)
      # Whole rows, so that tokens are added up in the order they are elsewhere.
      tokens, *squares = (rows.lay(x) for x in values)

      def total(tokens):
        scores = summed(tokens, rows.batch, squares[0] if squares else None)
        return objective(scores, rows.reference, rows.batch, given.everywhere)

      if not (by_hidden or by_head):
        return total(tokens), None
      out, pull_back, more = jax.vjp(total, tokens, has_aux=True)
      (g,) = pull_back(jnp.ones_like(out))
      return (out, more), rows.take(g, len(values[0]))

    def pull_back(at, scored, g, dhidden, dhead):
      h, y, logits, lse = scored
      dlogits = logps.by_logits(logits, lse, y, g, cap, h.dtype)
      if by_hidden:  # 0 for what lies beyond these examples
        new = logps.by_hidden(dlogits, head)
        new += jax.lax.dynamic_slice_in_dim(dhidden, at, size)
        dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, new, at, axis=0)
      return dhidden, dhead + logps.by_head(dlogits, h) if by_head else dhead

    def in_a_tile(first, sums, gradients):
      begin, stop = packed.group(first)
      values, scored = score(begin)
      more, g = judge(first, stop, values)
      if g is not None:
        gradients = pull_back(begin, scored, g, *gradients)
      return stop, jax.tree.map(jnp.add, sums, more), gradients

    def in_many(i, carry):
      sums, gradients = carry
      first = packed.longest[i]
      begin, tiles = packed.starts[first], packed.tiles(first)

      def fill(j, values):
        new, _ = score(begin + j * size)
        return jax.tree.map(
          lambda x, y: jax.lax.dynamic_update_slice(x, y, (j * size,)),
          values, new,
        )  # fmt: skip

      values = (jnp.zeros(packed.room, jnp.float32),) * (1 + confidence)
      values = jax.lax.fori_loop(0, tiles, fill, values)
      more, g = judge(first, first + 1, values)
      if g is not None:

        def again(j, gradients):
          at = begin + j * size
          mine = jax.lax.dynamic_slice_in_dim(g, j * size, size)
          return pull_back(at, score(at)[1], mine, *gradients)

        gradients = jax.lax.fori_loop(0, tiles, again, gradients)
      return jax.tree.map(jnp.add, sums, more), gradients

    gradients = (
      jnp.zeros_like(hidden) if by_hidden else None,
      jnp.zeros(head.shape, jnp.float32) if by_head else None,
    )
    none = jnp.zeros(size, jnp.float32)
    sums = jax.eval_shape(judge, 0, 0, (none,) * (1 + confidence))[0]
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    if packed.one:
      _, sums, gradients = in_a_tile(0, sums, gradients)
    else:
      _, sums, gradients = jax.lax.while_loop(
        lambda state: packed.left(state[0]),
        lambda state: in_a_tile(packed.next(state[0]), *state[1:]),
        (jnp.int32(0), sums, gradients),
      )
      if packed.room > size:
        sums, gradients = jax.lax.fori_loop(
          0, packed.long.sum(), in_many, (sums, gradients)
        )
    dhidden, dhead = gradients
    if by_hidden:
      dhidden = dhidden[: shape[0] * shape[1]].reshape(shape)
    return sums, (dhidden, dhead.astype(head.dtype) if by_head else None)

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


def slack(batch: Batch) -> int:
  """By how much tiles are larger, so that examples that end in one leave no
  need for more of them: scored tokens of an example, on average."""
  return batch.target.shape[1] // batch.lengths.shape[1]


def _is_primal(x):
  return hasattr(x, "perturbed")


class _Packed:
  """The scored tokens of all rows end to end, i32[N], and where the examples,
  i32[E], lie in them: side by side in a row, padding behind."""

  def __init__(self, given: Given, scored: int, tile: int):
    lengths = given.batch.lengths  # i32[B M K]
    rows, places, _ = lengths.shape
    self._given, self._scored = given, scored
    self.size = logps.tiling(rows * scored, tile, slack(given.batch))[1]
    self.one = rows * scored <= self.size
    # Tokens that the longest example may have, in whole tiles.
    self.room = -(-scored // self.size) * self.size
    self._behind = 0 if self.one else self.room
    # Rows that a tile may touch.
    self._rows = min(rows, math.ceil((self.size - 1) / scored) + 1)
    tokens = lengths.sum(axis=2)
    ends = jnp.cumsum(tokens, axis=1) + scored * jnp.arange(rows)[:, None]
    self.ends = ends.reshape(-1)
    tokens = tokens.reshape(-1)
    self.starts = self.ends - tokens
    self.long = tokens > self.size
    self.longest = jnp.argsort(~self.long)  # those first
    self.short = (tokens > 0) & ~self.long
    self._index = jnp.arange(rows * places)

  def flat(self, x: jax.Array) -> jax.Array:
    """[B S ...] -> [N ...], and room for a slice that begins anywhere."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.pad(x, ((0, self._behind),) + ((0, 0),) * (x.ndim - 1))

  def left(self, first: Any) -> jax.Array:
    """Whether a tile holds any example from `first` on."""
    return (self.short & (self._index >= first)).any()

  def next(self, first: Any) -> jax.Array:
    """The next of these."""
    return jnp.argmax(self.short & (self._index >= first))

  def group(self, first: Any) -> tuple[jax.Array, jax.Array]:
    """Its first token, and the example behind the last that the same tile
    holds."""
    begin = self.starts[first]
    over = (self.ends > begin + self.size) | self.long
    over &= self._index > first
    stop = jnp.where(over.any(), jnp.argmax(over), len(self._index))
    return begin, stop

  def tiles(self, example: Any) -> jax.Array:
    tokens = self.ends[example] - self.starts[example]
    return -(-tokens // self.size)

  def rows_of(self, first: Any, stop: Any) -> "_Rows":
    """The rows in which the examples [first, stop) of a tile lie."""
    batch, reference = self._given[:2]
    rows, places, _ = batch.lengths.shape
    row = jnp.minimum(first // places, rows - self._rows)

    def some(x):
      return jax.lax.dynamic_slice_in_dim(x, row, self._rows)

    index = some(self._index.reshape(rows, places))
    mine = (index >= first) & (index < stop)
    part = Batch(*(None,) * len(Batch._fields))._replace(
      slot=some(batch.slot),
      lengths=some(batch.lengths),
      weights=jnp.where(mine, some(batch.weights), 0.0),
      desirable=some(batch.desirable),
      margins=some(batch.margins),
    )
    begin = self.starts[first] - row * self._scored
    return _Rows(part, jax.tree.map(some, reference), begin)


class _Rows(NamedTuple):
  """Some rows of a batch: of others than the examples asked for, the weights
  are 0 and the scores mean nothing."""

  batch: Batch
  reference: Scores | None
  begin: jax.Array  # where the first example begins, in the rows end to end

  def lay(self, tokens: jax.Array) -> jax.Array:
    """Values of tokens from the first example on, f[N], at their place in the
    rows, f[B S]."""
    shape = self.batch.slot.shape
    rows = jnp.zeros(math.prod(shape) + len(tokens), tokens.dtype)
    rows = jax.lax.dynamic_update_slice(rows, tokens, (self.begin,))
    return rows[: math.prod(shape)].reshape(shape)

  def take(self, rows: jax.Array, tokens: int) -> jax.Array:
    """Values of the N tokens from the first example on, f[B S] -> f[N]."""
    rows = jnp.pad(rows.reshape(-1), (0, tokens))
    return jax.lax.dynamic_slice(rows, (self.begin,), (tokens,))
