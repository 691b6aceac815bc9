"""Log-probs of scored tokens from hidden states, without keeping logits.

Logits exist for one tile of rows at a time, in float32, forward and backward;
nothing of the size of the vocabulary is kept between the two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def token_logps(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  tile: int = 1024,
  cap: float | None = None,
  slack: int = 0,
) -> jax.Array:
  """log softmax(hidden @ head.T)[target], tile by tile.

  Args:
    hidden: f[N D], in the compute dtype.
    head: f[V D], the unembedding, in the same dtype.
    targets: i32[N], token ids in [0, V).
    tile: rows of logits alive at once; each is computed over the whole
      vocabulary in one product, so memory is `tile * V` floats.
    cap: logits become `cap * tanh(logits / cap)`; `None`: stay.
    slack: see `tiling`.

  Returns:
    f32[N]. Products accumulate in float32 and the log-sum-exp is float32,
    whatever dtype comes in.
  """
  return _by_tiles(hidden, head, targets, tile, False, cap, slack)[0]


def token_logps_and_squares(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  tile: int = 1024,
  cap: float | None = None,
  slack: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """`token_logps`, and log sum_v p(v)^2 at the same places, from one pass.

  Returns:
    f32[N] each; no gradient flows through the second.
  """
  return _by_tiles(hidden, head, targets, tile, True, cap, slack)


def tiling(rows: int, tile: int, slack: int = 0) -> tuple[int, int]:
  """Number and size of equal tiles of at most `tile` rows; if several, each
  larger than it must be by up to `slack` rows."""
  tiles = -(-rows // tile)
  size = -(-rows // tiles)
  return tiles, size if tiles == 1 else min(tile, size + slack)


def _by_tiles(hidden, head, targets, tile, squares, cap, slack):
  rows = hidden.shape[0]
  tiles, tile = tiling(rows, tile, slack)
  pad = tiles * tile - rows
  hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(tiles, tile, -1)
  targets = jnp.pad(targets, (0, pad)).reshape(tiles, tile)
  results = _tiled(squares, cap, hidden, head, targets)
  return tuple(x.reshape(-1)[:rows] for x in results)


def sum_by_slot(
  values: jax.Array, slot: jax.Array, shape: tuple[int, int]
) -> jax.Array:
  """Sums per response: f[B S], i32[B S] -> f32[B M K] for `shape` (M, K).

  A masked reduction and not a scatter: it adds in the same order for policy and
  reference on every device, so equal models give equal sums to the last bit.
  """
  mine = slot[:, :, None] == jnp.arange(shape[0] * shape[1])  # bool[B S MK]
  sums = jnp.where(mine, values[:, :, None], 0).sum(axis=1)
  return sums.reshape(slot.shape[0], *shape)


def last_of_slot(slot: jax.Array, slots: int) -> jax.Array:
  """Where the last scored token of each response stands, i32[B S] -> i32[B N]
  for N slots; S for one that is not there."""
  scored = slot.shape[1]
  mine = slot[:, :, None] == jnp.arange(slots)  # bool[B S N]
  last = jnp.where(mine, jnp.arange(scored)[:, None], -1).max(axis=1)
  return jnp.where(last < 0, scored, last)


def beyond(slot: jax.Array, limits: jax.Array) -> jax.Array:
  """Which scored tokens lie beyond a limit of their response.

  Args:
    slot: i32[B S]; the tokens of a response lie side by side, in order.
    limits: i32[B M K].

  Returns:
    bool[B S]; False for padding.
  """
  rows, scored = slot.shape
  limits = limits.reshape(rows, -1)
  slots, index = limits.shape[1], jnp.arange(scored)
  mine = slot[:, :, None] == jnp.arange(slots)
  first = jnp.where(mine, index[:, None], scored).min(axis=1)  # i32[B MK]
  here = jnp.minimum(slot, slots - 1)
  limit = jnp.take_along_axis(first + limits, here, axis=1)
  return (index >= limit) & (slot < slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(squares, cap, hidden, head, targets):
  return _forward(squares, cap, hidden, head, targets)[0]


def capped(logits: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(logits / cap), or the logits as they are for `None`."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def _logits(hidden, head, cap):
  # f32 out of the product itself: rounding logits to bf16 costs tenths of a
  # nat over a few hundred tokens.
  logits = jnp.einsum(
    "nd,vd->nv", hidden, head, preferred_element_type=jnp.float32
  )
  return capped(logits, cap)


def score_tile(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  cap: float | None,
  squares: bool,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
  """Logits f32[N V] of a tile, their log-sum-exp f32[N], and the values of
  `token_logps` or `token_logps_and_squares`."""
  logits = _logits(hidden, head, cap)
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  values = (picked - lse,)
  if squares:
    values += (jax.nn.logsumexp(2 * logits, axis=-1) - 2 * lse,)
  return logits, lse, values


def by_logits(
  logits: jax.Array,
  lse: jax.Array,
  targets: jax.Array,
  g: jax.Array,
  cap: float | None,
  dtype: Any,
) -> jax.Array:
  """Gradient f[N V] by the logits (before a cap) of log-probs whose own is g
  f32[N], in the compute dtype, or the products with it would run in float32."""
  vocabulary = jnp.arange(logits.shape[-1])
  probs = jnp.exp(logits - lse[:, None])
  dlogits = jnp.where(vocabulary == targets[:, None], 1.0, 0.0) - probs
  if cap is not None:  # the derivative of tanh
    dlogits *= 1 - (logits / cap) ** 2
  return (g[:, None] * dlogits).astype(dtype)


def by_hidden(dlogits: jax.Array, head: jax.Array) -> jax.Array:
  """f[N V] and f[V D] -> f[N D]."""
  return jnp.einsum("nv,vd->nd", dlogits, head)


def by_head(dlogits: jax.Array, hidden: jax.Array) -> jax.Array:
  """f[N V] and f[N D] -> f32[V D]."""
  return jnp.einsum(
    "nv,nd->vd", dlogits, hidden, preferred_element_type=jnp.float32
  )


def _forward(squares, cap, hidden, head, targets):
  def one_tile(_, xs):
    _, lse, values = score_tile(xs[0], head, xs[1], cap, squares)
    return None, (values, lse)

  _, (values, lse) = jax.lax.scan(one_tile, None, (hidden, targets))
  return values, (hidden, head, targets, lse)


def _backward(_, cap, residuals, g):
  hidden, head, targets, lse = residuals

  def one_tile(dhead, xs):
    h, y, lse, g = xs
    dlogits = by_logits(_logits(h, head, cap), lse, y, g, cap, h.dtype)
    return dhead + by_head(dlogits, h), by_hidden(dlogits, head)

  zero = jnp.zeros(head.shape, jnp.float32)
  dhead, dhidden = jax.lax.scan(one_tile, zero, (hidden, targets, lse, g[0]))
  return dhidden, dhead.astype(head.dtype), None


_tiled.defvjp(_forward, _backward)
