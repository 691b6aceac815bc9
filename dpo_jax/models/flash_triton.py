"""Attention over key ranges as GPU kernels, in Pallas by way of Triton.

One program does one block of queries of one head: an online softmax over the
blocks of keys between the first and the last that the block sees (Dao 2023,
2307.08691). The backward recomputes scores from the saved log-sum-exp, in two
kernels without atomics: one per block of queries for dq, one per block of keys,
over all query heads that share it, for dk and dv; sums come in one order
always. Accumulation is float32, exponentials are to base 2.

On other devices than GPUs the kernels are interpreted: right, and slow.

Letters: B rows, T queries, U keys, H heads, K kv heads, G = H / K, h head dim,
N blocks of queries, q queries a block, u keys a block.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dpo_jax.models.blockwise import MASKED, Window
from dpo_jax.models.kept import kept
from dpo_jax.models.key_blocks import bounds, padded

try:  # deprecated by jax 0.12, which says that a later one will not have it
  from jax.experimental.pallas import triton as plgpu
except ImportError:
  plgpu = None

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
LARGEST_HEAD = 256
_LOG2E = math.log2(math.e)


class Tile(NamedTuple):
  """How one kernel cuts its work."""

  queries: int
  keys: int
  stages: int
  warps: int = 4


class Tiles(NamedTuple):
  forward: Tile
  dq: Tile
  dkv: Tile


# By the bytes of one head of one token: what compiles with hardly a register
# spilled and for 100 KB of shared memory (115 on Hopper, which has more). They
# are small, as pairs of a packed row are short.
_TILES = {
  128: Tiles(Tile(128, 64, 3), Tile(64, 64, 2), Tile(64, 64, 2)),
  256: Tiles(Tile(64, 64, 3), Tile(64, 64, 2), Tile(64, 64, 2, 8)),
  512: Tiles(Tile(64, 32, 2, 8), Tile(32, 32, 2, 8), Tile(32, 32, 2, 8)),
  1024: Tiles(Tile(32, 32, 1, 8), Tile(32, 16, 1, 8), Tile(16, 16, 1, 8)),
}


def make_tiles(head_dim: int, dtype: Any) -> Tiles:
  """Those that the kernels use of themselves."""
  size = head_dim * jnp.dtype(dtype).itemsize
  return next(tiles for limit, tiles in _TILES.items() if size <= limit)


def why_not(dtype: Any, head_dim: int) -> str:
  """Why the kernels do not take such queries; "" where they do."""
  if plgpu is None:
    return f"attention 'triton': jax {jax.__version__} has no Triton any more"
  if jnp.dtype(dtype) in DTYPES and head_dim <= LARGEST_HEAD:
    return ""
  return (
    "attention 'triton' takes float32, bfloat16 or float16 and heads of at"
    f" most {LARGEST_HEAD}, not {jnp.dtype(dtype)} and {head_dim}"
  )


def flash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  key_start: jax.Array,
  key_end: jax.Array,
  *,
  window: Window | None = None,
  scale: float,
  cap: float | None = None,
  tiles: Tiles | None = None,
) -> jax.Array:
  """See `attention.attention`; f[B T H h] and f[B U K h] -> f[B T H h].

  Raises:
    ValueError: a dtype or a head size that the kernels do not take.
  """
  T, h = q.shape[1], q.shape[3]
  if reason := why_not(q.dtype, h):
    raise ValueError(reason)
  wide = max(16, pl.next_power_of_2(h))
  tiles = make_tiles(wide, q.dtype) if tiles is None else tiles
  queries = max(tile.queries for tile in tiles)
  keys = max(tile.keys for tile in tiles)
  q, k, v = (padded(x, 3, wide) for x in (q, k, v))
  q, start, end = (padded(x, 1, queries) for x in (q, key_start, key_end))
  k, v = padded(k, 1, keys), padded(v, 1, keys)
  if window is not None:
    oldest, at = window
    window = Window(padded(oldest, 1, queries), padded(at, 1, keys))
  out = _attend(q, k, v, (start, end, window), scale, cap, tiles)
  return out[:, :T, :, :h]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, ranges, scale, cap, tiles):
  return _forward(q, k, v, ranges, scale, cap, tiles)[0]


def _forward(q, k, v, ranges, scale, cap, tiles):
  B, T, H = q.shape[:3]
  tile = tiles.forward
  inputs, specs = _for_queries(q, k, v, ranges, tile)
  out, lse = _run(
    functools.partial(_forward_kernel, tile=tile, scale=scale, cap=cap),
    tile, (T // tile.queries, H, B), inputs, specs,
    (specs["q"], _numbers(tile.queries)),
    (
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    ),
  )  # fmt: skip
  out, lse = kept((out, lse))
  return out, (q, k, v, ranges, out, lse)


def _backward(scale, cap, tiles, residuals, g):
  q, k, v, ranges, out, lse = residuals
  B, T, H, h = q.shape
  U, K = k.shape[1:3]
  tile = tiles.dq
  delta = jnp.einsum(
    "bthd,bthd->bht", g, out, preferred_element_type=jnp.float32
  )
  inputs, specs = _for_queries(q, k, v, ranges, tile)
  specs |= {"g": specs["q"]} | dict.fromkeys(
    ("lse", "delta"), _numbers(tile.queries)
  )
  inputs |= {"g": g, "lse": lse, "delta": delta}
  (dq,) = _run(
    functools.partial(_dq_kernel, tile=tile, scale=scale, cap=cap),
    tile, (T // tile.queries, H, B), inputs, specs, (specs["q"],),
    (jax.ShapeDtypeStruct(q.shape, q.dtype),),
  )  # fmt: skip
  tile = tiles.dkv
  first, last = bounds(*ranges, U, tile.queries, tile.keys)[1]
  inputs |= {"first": first, "last": last}
  block = pl.BlockSpec((None, tile.keys, None, h), lambda j, n, b: (b, j, n, 0))
  group = pl.BlockSpec((None, T, H // K, h), lambda j, n, b: (b, 0, n, 0))
  each = pl.BlockSpec((None, H // K, T), lambda j, n, b: (b, n, 0))
  row = pl.BlockSpec((None, T), lambda j, n, b: (b, 0))
  specs = {"q": group, "k": block, "v": block, "g": group, "lse": each}
  specs |= {"delta": each} | dict.fromkeys(("start", "end", "oldest"), row)
  specs["at"] = pl.BlockSpec((None, tile.keys), lambda j, n, b: (b, j))
  bound = pl.BlockSpec((None, U // tile.keys), lambda j, n, b: (b, 0))
  specs |= {"first": bound, "last": bound}
  dk, dv = _run(
    functools.partial(_dkv_kernel, tile=tile, scale=scale, cap=cap),
    tile, (U // tile.keys, K, B), inputs, specs, (block, block),
    (
      jax.ShapeDtypeStruct(k.shape, k.dtype),
      jax.ShapeDtypeStruct(v.shape, v.dtype),
    ),
  )  # fmt: skip
  return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _for_queries(q, k, v, ranges, tile):
  """Arrays, and what of them a program (block of queries, head, row) reads."""
  start, end, window = ranges
  T, H, h = q.shape[1:]
  U, K = k.shape[1:3]
  group = H // K
  first, last = bounds(start, end, window, U, tile.queries, tile.keys)[0]
  inputs = {"first": first, "last": last, "start": start, "end": end}
  inputs |= {"q": q, "k": k, "v": v}
  if window is not None:
    inputs |= {"oldest": window.oldest, "at": window.positions}
  own = pl.BlockSpec((None, tile.queries), lambda i, n, b: (b, i))
  bound = pl.BlockSpec((None, T // tile.queries), lambda i, n, b: (b, 0))
  keys = pl.BlockSpec(
    (None, U, None, h), lambda i, n, b: (b, 0, jax.lax.div(n, group), 0)
  )
  specs = dict.fromkeys(("start", "end", "oldest"), own)
  specs |= {"first": bound, "last": bound, "k": keys, "v": keys}
  specs["q"] = pl.BlockSpec(
    (None, tile.queries, None, h), lambda i, n, b: (b, i, n, 0)
  )
  specs["at"] = pl.BlockSpec((None, U), lambda i, n, b: (b, 0))
  return inputs, specs


def _numbers(block):
  """A number per query and head, of a block: of f32[B H T]."""
  return pl.BlockSpec((None, None, block), lambda i, n, b: (b, n, i))


def _run(kernel, tile, grid, inputs, specs, out_specs, out_shape):
  """One kernel over named inputs, on a GPU or interpreted."""
  names = tuple(inputs)

  def named(*refs):
    kernel(dict(zip(names, refs)), *refs[len(names) :])

  named.__name__ = kernel.func.__name__.strip("_")

  def call(interpret):
    return pl.pallas_call(
      named,
      grid=grid,
      in_specs=[specs[name] for name in names],
      out_specs=out_specs,
      out_shape=out_shape,
      compiler_params=plgpu.CompilerParams(
        num_warps=tile.warps, num_stages=tile.stages
      ),
      interpret=interpret,
      name=named.__name__,
    )

  return jax.lax.platform_dependent(
    *inputs.values(), cuda=call(False), rocm=call(False), default=call(True)
  )


def _dot(a, b, over_rows=False):
  """Products of the rows of a with those of b; or a @ b."""
  dims = ((1,), (0,)) if over_rows else ((1,), (1,))
  return jax.lax.dot_general(
    a, b, (dims, ((), ())), preferred_element_type=jnp.float32
  )


def _scores(a, b, visible, scale, cap):
  """Scores to base 2 of rows with rows; and the derivative of the cap, or 1."""
  scores, slope = _dot(a, b) * scale, 1.0
  if cap is not None:
    bent = jnp.tanh(scores / cap)
    scores, slope = cap * bent, 1 - bent * bent
  return jnp.where(visible, scores * _LOG2E, MASKED), slope


def _seen(refs, place, along):
  """The ranges of queries at a place, as rows or columns."""
  names = [name for name in ("start", "end", "oldest") if name in refs]
  return [jnp.expand_dims(refs[name][place], along) for name in names]


def _visible(keys, at, start, end, oldest=None):
  visible = (keys >= start) & (keys < end)
  return visible if oldest is None else visible & (at >= oldest)


def _over_keys(refs, tile, scale, cap, add, carry):
  """Folds `add(carry, scores, slope, k, v)` over the keys of a block of
  queries."""
  q, seen = refs["q"][...], _seen(refs, slice(None), 1)
  i = pl.program_id(0)

  def body(j, carry):
    here = pl.ds(j * tile.keys, tile.keys)
    k, v = refs["k"][here, :], refs["v"][here, :]
    keys = (j * tile.keys + jnp.arange(tile.keys))[None]
    at = refs["at"][here][None] if "at" in refs else None
    scores, slope = _scores(q, k, _visible(keys, at, *seen), scale, cap)
    return add(carry, scores, slope, k, v)

  return jax.lax.fori_loop(refs["first"][i], refs["last"][i], body, carry)


def _forward_kernel(refs, out_ref, lse_ref, *, tile, scale, cap):
  def add(carry, scores, _, k, v):
    top, total, out = carry
    new_top = jnp.maximum(top, scores.max(axis=1))
    probs = jnp.exp2(scores - new_top[:, None])
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + probs.sum(axis=1)
    out = out * shrink[:, None] + _dot(probs.astype(v.dtype), v, True)
    return new_top, total, out

  # Above any masked score, so that masked keys weigh nothing even where a query
  # has seen no key yet.
  top = jnp.full((tile.queries,), MASKED / 2, jnp.float32)
  out = jnp.zeros(out_ref.shape, jnp.float32)
  nothing = top, jnp.zeros_like(top), out
  top, total, out = _over_keys(refs, tile, scale, cap, add, nothing)
  total = jnp.maximum(total, 1e-30)
  out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
  lse_ref[...] = top + jnp.log2(total)


def _dq_kernel(refs, dq_ref, *, tile, scale, cap):
  g = refs["g"][...]
  lse, delta = refs["lse"][...][:, None], refs["delta"][...][:, None]

  def add(dq, scores, slope, k, v):
    probs = jnp.exp2(scores - lse)
    dscores = probs * (_dot(g, v) - delta) * slope
    return dq + _dot(dscores.astype(k.dtype), k, True)

  nothing = jnp.zeros(dq_ref.shape, jnp.float32)
  dq = _over_keys(refs, tile, scale, cap, add, nothing)
  dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(refs, dk_ref, dv_ref, *, tile, scale, cap):
  k, v = refs["k"][...], refs["v"][...]
  j = pl.program_id(0)
  keys = (j * tile.keys + jnp.arange(tile.keys))[:, None]
  at = refs["at"][...][:, None] if "at" in refs else None
  first, last = refs["first"][j], refs["last"][j]

  def of_head(n, carry):
    def body(i, carry):
      dk, dv = carry
      here = pl.ds(i * tile.queries, tile.queries)
      q, g = refs["q"][here, n, :], refs["g"][here, n, :]
      lse, delta = refs["lse"][n, here][None], refs["delta"][n, here][None]
      visible = _visible(keys, at, *_seen(refs, here, 0))
      scores, slope = _scores(k, q, visible, scale, cap)
      probs = jnp.exp2(scores - lse)
      dv += _dot(probs.astype(g.dtype), g, True)
      dscores = probs * (_dot(v, g) - delta) * slope
      return dk + _dot(dscores.astype(q.dtype), q, True), dv

    return jax.lax.fori_loop(first, last, body, carry)

  nothing = (jnp.zeros(dk_ref.shape, jnp.float32),) * 2
  dk, dv = jax.lax.fori_loop(0, refs["q"].shape[1], of_head, nothing)
  dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)
