"""Attention over key ranges as TPU kernels, in Pallas by way of Mosaic.

The grid ends in a loop over the blocks of keys between the first and the last
that a block of queries sees; which these are depends on the data and is
prefetched, so that the blocks are already on their way when their turn comes.
It is as long as the longest of these loops, and shorter ones idle at its end.
Otherwise as `flash_triton.py`: an online softmax forward (Dao 2023,
2307.08691), and a backward in two kernels.

Scores lie transposed, keys down and queries across: what there is one of per
query (ranges, log-sum-exp) is then a row, as TPUs like to hold it.

On other devices than TPUs the kernels are interpreted: right, and slow.

Letters: B rows, T queries, U keys, H heads, K kv heads, G = H / K, h head dim,
N blocks of queries, M blocks of keys, q queries a block, u keys a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dpo_jax.models.blockwise import MASKED, Window
from dpo_jax.models.kept import kept
from dpo_jax.models.key_blocks import bounds, padded

DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16)))
LARGEST_HEAD = 256
LANES = 128


class Tile(NamedTuple):
  queries: int
  keys: int


def block_size(length: int) -> int:
  """The largest block that fills up a length by an eighth at most."""
  return next(
    (b for b in (512, 256) if -length % b <= length // 8), LANES
  )  # fmt: skip


def why_not(dtype: Any, head_dim: int) -> str:
  """Why the kernels do not take such queries; "" where they do."""
  if jnp.dtype(dtype) in DTYPES and head_dim <= LARGEST_HEAD:
    return ""
  return (
    "attention 'mosaic' takes float32 or bfloat16 and heads of at"
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
  tile: Tile | None = None,
) -> jax.Array:
  """See `attention.attention`; f[B T H h] and f[B U K h] -> f[B T H h].

  Raises:
    ValueError: a dtype or a head size that the kernels do not take.
  """
  T, h = q.shape[1], q.shape[3]
  if reason := why_not(q.dtype, h):
    raise ValueError(reason)
  tile = tile or Tile(block_size(T), block_size(k.shape[1]))
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  q = padded(q, 2, tile.queries)
  k, v = (padded(x, 2, tile.keys) for x in (k, v))
  start, end = (padded(x, 1, tile.queries) for x in (key_start, key_end))
  if window is not None:
    oldest, at = window
    window = Window(padded(oldest, 1, tile.queries), padded(at, 1, tile.keys))
  out = _attend(q, k, v, (start, end, window), scale, cap, tile)
  return out[:, :, :T].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, ranges, scale, cap, tile):
  """q f[B H T h], k and v f[B K U h] -> f[B H T h]."""
  return _forward(q, k, v, ranges, scale, cap, tile)[0]


def _forward(q, k, v, ranges, scale, cap, tile):
  B, H, T, h = q.shape
  inputs, of_queries, _ = _inputs(q, k, v, ranges, tile)
  specs, grid = _for_queries(of_queries, q, k, tile)
  out, lse = _run(
    functools.partial(_forward_kernel, scale=scale, cap=cap),
    of_queries, grid, inputs, specs, (specs["q"], specs["lse"]),
    (
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
    ),
    [(1, tile.queries), (1, tile.queries), (h, tile.queries)],
  )  # fmt: skip
  out, lse = kept((out, lse))
  return out, (q, k, v, ranges, out, lse)


def _backward(scale, cap, tile, residuals, g):
  q, k, v, ranges, out, lse = residuals
  h = q.shape[3]
  delta = jnp.einsum(
    "bhtd,bhtd->bht", g, out, preferred_element_type=jnp.float32
  )
  inputs, of_queries, of_keys = _inputs(q, k, v, ranges, tile)
  inputs |= {"g": g, "lse": lse, "delta": delta[:, :, None]}
  options = {"scale": scale, "cap": cap}
  specs, grid = _for_queries(of_queries, q, k, tile)
  (dq,) = _run(
    functools.partial(_dq_kernel, **options),
    of_queries, grid, inputs, specs, (specs["q"],),
    (jax.ShapeDtypeStruct(q.shape, q.dtype),),
    [(tile.queries, h)],
  )  # fmt: skip
  specs, grid = _for_keys(of_keys, q, k, tile)
  dk, dv = _run(
    functools.partial(_dkv_kernel, **options),
    of_keys, grid, inputs, specs, (specs["k"], specs["v"]),
    (
      jax.ShapeDtypeStruct(k.shape, k.dtype),
      jax.ShapeDtypeStruct(v.shape, v.dtype),
    ),
    [(tile.keys, h), (tile.keys, h)],
  )  # fmt: skip
  return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _inputs(q, k, v, ranges, tile):
  """Named arrays as the kernels read them, and bounds both ways."""
  start, end, window = ranges
  inputs = {"q": q, "k": k, "v": v}
  inputs |= {"start": start[:, None], "end": end[:, None]}
  if window is not None:
    at = window.positions[..., None]
    at = jnp.broadcast_to(at, (*at.shape[:2], LANES))
    inputs |= {"oldest": window.oldest[:, None], "at": at}
  both = bounds(start, end, window, k.shape[2], tile.queries, tile.keys)
  return inputs, *both


def _for_queries(bounds, q, k, tile):
  """Specs and grid (row, head, block of queries, step over blocks of keys)."""
  B, H, T, h = q.shape
  group, blocks = H // k.shape[1], T // tile.queries

  def query(b, n, i, step, first, last):
    return b, n, i

  def key(b, n, i, step, first, last):
    return b, jax.lax.div(n, group), _nth(first, last, b * blocks + i, step)[0]

  return _specs(query, key, h, tile), (B, H, blocks, _steps(bounds))


def _for_keys(bounds, q, k, tile):
  """Specs and grid (row, kv head, block of keys, head of those that share it,
  step over blocks of queries)."""
  B, K, U, h = k.shape
  group, blocks = q.shape[1] // K, U // tile.keys

  def query(b, n, j, head, step, first, last):
    i = _nth(first, last, b * blocks + j, step)[0]
    return b, n * group + head, i

  def key(b, n, j, head, step, first, last):
    return b, n, j

  return _specs(query, key, h, tile), (B, K, blocks, group, _steps(bounds))


def _steps(bounds):
  """One at least, to write the zeros of what meets nothing."""
  return jnp.maximum((bounds.last - bounds.first).max(), 1)


def _nth(first, last, at, step):
  """The block that another meets at a step, and whether it does: past the last
  it is still the last, which is there already."""
  nth, end = first[at] + step, last[at]
  return jnp.maximum(jnp.minimum(nth, end - 1), 0), nth < end


def _specs(query, key, h, tile):
  """Specs by name, from functions of the grid's indices and of the bounds to
  (row, head, block) of queries and of keys."""

  def spec(shape, place):
    return pl.BlockSpec(shape, place)

  def whole(place):
    return lambda *at: (*place(*at), 0)

  def number(*at):
    b, n, i = query(*at)
    return b, n, 0, i

  def ends(*at):
    b, _, i = query(*at)
    return b, 0, i

  def positions(*at):
    b, _, j = key(*at)
    return b, j, 0

  queries = spec((None, None, tile.queries, h), whole(query))
  keys = spec((None, None, tile.keys, h), whole(key))
  numbers = spec((None, None, 1, tile.queries), number)
  return (
    {"q": queries, "g": queries, "k": keys, "v": keys}
    | dict.fromkeys(("lse", "delta"), numbers)
    | dict.fromkeys(
      ("start", "end", "oldest"), spec((None, 1, tile.queries), ends)
    )
    | {"at": spec((None, tile.keys, LANES), positions)}
  )


class _Turn(NamedTuple):
  """Where in the grid a kernel is."""

  key_block: jax.Array
  live: jax.Array  # whether it is to do anything
  begins: jax.Array  # with an output block
  ends: jax.Array


def _run(kernel, bounds, grid, inputs, specs, out_specs, out_shape, scratch):
  """One kernel over named inputs, on a TPU or interpreted."""
  names, name = tuple(inputs), kernel.func.__name__.strip("_")
  over_keys = len(grid) == 4

  def body(first, last, *refs):
    ids = [pl.program_id(axis) for axis in range(len(grid))]
    sizes = [pl.num_programs(axis) for axis in range(len(grid))]
    nth, live = _nth(first, last, ids[0] * grid[2] + ids[2], ids[-1])
    begins, ends = True, True
    for at, size in zip(ids[3:], sizes[3:]):
      begins, ends = begins & (at == 0), ends & (at == size - 1)
    turn = _Turn(nth if over_keys else ids[2], live, begins, ends)
    count = len(names) + len(out_shape)
    outputs, sums = refs[len(names) : count], refs[count:]

    @pl.when(begins)
    def _():
      for ref in sums:
        ref[...] = jnp.zeros_like(ref)

    kernel(dict(zip(names, refs)), outputs, sums, turn)

  def call(interpret):
    return pl.pallas_call(
      body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=grid,
        in_specs=[specs[name] for name in names],
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      ),
      out_shape=out_shape,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
      ),
      interpret=interpret,
      name=name,
    )

  flat = [x.reshape(-1) for x in bounds]
  return jax.lax.platform_dependent(
    *flat, *inputs.values(), tpu=call(False), default=call(True)
  )


def _dot(a, b, axis_a, axis_b):
  """Sums over one axis of each."""
  return jax.lax.dot_general(
    a, b, (((axis_a,), (axis_b,)), ((), ())),
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def _scores(refs, turn, scale, cap):
  """f32[u q], and the derivative of the cap, or 1."""
  q, k = refs["q"][...], refs["k"][...]
  scores, slope = _dot(k, q, 1, 1) * scale, 1.0
  if cap is not None:
    bent = jnp.tanh(scores / cap)
    scores, slope = cap * bent, 1 - bent * bent
  keys = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  keys += turn.key_block * scores.shape[0]
  visible = (keys >= refs["start"][...]) & (keys < refs["end"][...])
  if "at" in refs:
    visible &= refs["at"][...][:, :1] >= refs["oldest"][...]
  return jnp.where(visible, scores, MASKED), slope


def _forward_kernel(refs, outputs, sums, turn, *, scale, cap):
  (out_ref, lse_ref), (top_ref, total_ref, sum_ref) = outputs, sums

  @pl.when(turn.begins)
  def _():
    # Above any masked score, so that masked keys weigh nothing even where a
    # query has seen no key yet.
    top_ref[...] = jnp.full_like(top_ref, MASKED / 2)

  @pl.when(turn.live)
  def _():
    scores, _ = _scores(refs, turn, scale, cap)
    v, top = refs["v"][...], top_ref[...]
    new_top = jnp.maximum(top, scores.max(axis=0, keepdims=True))
    probs = jnp.exp(scores - new_top)
    shrink = jnp.exp(top - new_top)
    total_ref[...] = total_ref[...] * shrink + probs.sum(axis=0, keepdims=True)
    new = _dot(v, probs.astype(v.dtype), 0, 0)  # f32[h q]
    sum_ref[...] = sum_ref[...] * shrink + new
    top_ref[...] = new_top

  @pl.when(turn.ends)
  def _():
    total = jnp.maximum(total_ref[...], 1e-30)
    out_ref[...] = (sum_ref[...] / total).T.astype(out_ref.dtype)
    lse_ref[...] = top_ref[...] + jnp.log(total)


def _probs(refs, turn, scale, cap):
  """Probabilities f32[u q], and the gradient of the scores, unscaled."""
  scores, slope = _scores(refs, turn, scale, cap)
  probs = jnp.exp(scores - refs["lse"][...])
  dprobs = _dot(refs["v"][...], refs["g"][...], 1, 1)
  return probs, probs * (dprobs - refs["delta"][...]) * slope


def _dq_kernel(refs, outputs, sums, turn, *, scale, cap):
  (dq_ref,), (sum_ref,) = outputs, sums

  @pl.when(turn.live)
  def _():
    k = refs["k"][...]
    _, dscores = _probs(refs, turn, scale, cap)
    sum_ref[...] += _dot(dscores.astype(k.dtype), k, 0, 0)

  @pl.when(turn.ends)
  def _():
    dq_ref[...] = (sum_ref[...] * scale).astype(dq_ref.dtype)


def _dkv_kernel(refs, outputs, sums, turn, *, scale, cap):
  (dk_ref, dv_ref), (dk_sum_ref, dv_sum_ref) = outputs, sums

  @pl.when(turn.live)
  def _():
    q, g = refs["q"][...], refs["g"][...]
    probs, dscores = _probs(refs, turn, scale, cap)
    dv_sum_ref[...] += _dot(probs.astype(g.dtype), g, 1, 0)
    dk_sum_ref[...] += _dot(dscores.astype(q.dtype), q, 1, 0)

  @pl.when(turn.ends)
  def _():
    dk_ref[...] = (dk_sum_ref[...] * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
