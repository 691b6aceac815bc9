"""Attention over contiguous key ranges, behind one function.

Each query i of a row sees the keys in `[key_start[i], key_end[i])`: two
integers per token say causality, packing, padding and the mirrored rows of
`batch.py`. A query with an empty range (padding) yields zeros.

Letters: B rows, T queries, U keys, H heads, K kv heads (H = G K), h head dim.
"""

import functools
import math

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("blockwise", "dense")
_MASKED = -1e30  # finite: a row of it stays finite under softmax


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  key_start: jax.Array,
  key_end: jax.Array,
  *,
  scale: float | None = None,
  implementation: str = "blockwise",
  block: int = 128,
) -> jax.Array:
  """Softmax attention restricted to each query's range of keys.

  Args:
    q: f[B T H h].
    k: f[B U K h].
    v: f[B U K h].
    key_start: i32[B T], first visible key.
    key_end: i32[B T], one past the last visible key.
    scale: factor on the scores; `None` is `h ** -0.5`.
    implementation: "blockwise" runs a block of queries at a time and recomputes
      scores in the backward, so only `[B H block U]` of them exist at once;
      "dense" is the plain form with a [B T U] mask, the oracle of the tests.
    block: queries per block.

  Returns:
    f[B T H h], in the dtype of q; scores and softmax are float32.

  Raises:
    ValueError: unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} should be one of {IMPLEMENTATIONS}"
    )
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  attend = functools.partial(_attend, scale=scale)
  if implementation == "dense" or q.shape[1] <= block:
    return attend(q, k, v, key_start, key_end)
  return _blockwise(attend, q, k, v, key_start, key_end, block)


def _attend(q, k, v, key_start, key_end, *, scale):
  B, T, H, h = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, H // K, h)
  scores = jnp.einsum(
    "btkgh,bukh->bkgtu", q, k, preferred_element_type=jnp.float32
  )
  keys = jnp.arange(k.shape[1])
  visible = (keys >= key_start[..., None]) & (keys < key_end[..., None])
  visible = visible[:, None, None]  # bool[B 1 1 T U]
  scores = jnp.where(visible, scores * scale, _MASKED)
  probs = jax.nn.softmax(scores, axis=-1)
  probs = jnp.where(visible, probs, 0.0).astype(v.dtype)
  return jnp.einsum("bkgtu,bukh->btkgh", probs, v).reshape(B, T, H, h)


def _blockwise(attend, q, k, v, key_start, key_end, block):
  T = q.shape[1]
  blocks = math.ceil(T / block)
  pad = blocks * block - T

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], blocks, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  # Padded queries get the empty range [0, 0).
  xs = split(q), split(key_start), split(key_end)

  @jax.checkpoint
  def one_block(_, xs):
    q, start, end = xs
    return None, attend(q, k, v, start, end)

  _, out = jax.lax.scan(one_block, None, xs)
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(q.shape[0], blocks * block, *q.shape[2:])[:, :T]
