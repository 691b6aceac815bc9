"""Attention over contiguous key ranges, behind one function.

Each query i of a row sees the keys in `[key_start[i], key_end[i])`: two
integers per token say causality, packing, padding and the mirrored rows of
`batch.py`. A query with an empty range (padding) yields zeros. A sliding window
hides some of a range by position: in a mirrored row the rejected branch then
sees its own beginning and the prompt's end, with a gap between them.

Letters: B rows, T queries, U keys, H heads, K kv heads (H = G K), h head dim.
"""

import jax
import jax.numpy as jnp

from dpo_jax.models.blockwise import MASKED, Window, blockwise_attention

IMPLEMENTATIONS = ("blockwise", "dense")


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  key_start: jax.Array,
  key_end: jax.Array,
  *,
  window: Window | None = None,
  scale: float | None = None,
  cap: float | None = None,
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
    window: hides keys of the range by their positions; `None`: nothing.
    scale: factor on the scores; `None` is `h ** -0.5`.
    cap: scores become `cap * tanh(scores / cap)`; `None`: stay.
    implementation: "blockwise" goes block by block, skips the keys that no
      query of a block sees and recomputes scores in the backward
      (`blockwise.py`); "dense" is the plain form with a [B T U] mask, the
      oracle of the tests, and what short rows use.
    block: queries per block; rows that are no longer than it are dense.

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
  if implementation == "dense" or q.shape[1] <= block:
    return _dense(q, k, v, key_start, key_end, window, scale, cap)
  return blockwise_attention(
    q, k, v, key_start, key_end,
    window=window, scale=scale, cap=cap, block=block,
  )  # fmt: skip


def _dense(q, k, v, key_start, key_end, window, scale, cap):
  B, T, H, h = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, H // K, h)
  scores = jnp.einsum(
    "btkgh,bukh->bkgtu", q, k, preferred_element_type=jnp.float32
  )
  keys = jnp.arange(k.shape[1])
  visible = (keys >= key_start[..., None]) & (keys < key_end[..., None])
  if window is not None:
    visible &= window.positions[:, None] >= window.oldest[..., None]
  visible = visible[:, None, None]  # bool[B 1 1 T U]
  scores *= scale
  if cap is not None:
    scores = cap * jnp.tanh(scores / cap)
  scores = jnp.where(visible, scores, MASKED)
  probs = jax.nn.softmax(scores, axis=-1)
  probs = jnp.where(visible, probs, 0.0).astype(v.dtype)
  return jnp.einsum("bkgtu,bukh->btkgh", probs, v).reshape(B, T, H, h)
