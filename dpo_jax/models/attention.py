"""Attention over contiguous key ranges, behind one function.

Each query i of a row sees the keys in `[key_start[i], key_end[i])`: two
integers per token say causality, packing, padding and the mirrored rows of
`batch.py`. A query with an empty range (padding) yields zeros. A sliding window
hides some of a range by position: in a mirrored row the rejected branch then
sees its own beginning and the prompt's end, with a gap between them.

Letters: B rows, T queries, U keys, H heads, K kv heads (H = G K), h head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models import flash_mosaic, flash_triton
from dpo_jax.models.blockwise import MASKED, Window, blockwise_attention

KERNELS = {"triton": flash_triton, "mosaic": flash_mosaic}
IMPLEMENTATIONS = ("auto", "blockwise", "dense", *KERNELS)


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
  implementation: str = "auto",
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
    implementation: one of
      "blockwise", plain JAX: goes block by block, skips the keys that no query
      of a block sees and recomputes scores in the backward (`blockwise.py`);
      "triton", the same as kernels for GPUs (`flash_triton.py`);
      "mosaic", the same as kernels for TPUs (`flash_mosaic.py`);
      "dense", the plain form with a [B T U] mask, the oracle of the tests, and
      what short rows use;
      "auto", what `choose` says of the default device.
      Kernels are interpreted on other devices than theirs, which is slow.
    block: queries per block; rows that are no longer than it are dense.

  Returns:
    f[B T H h], in the dtype of q; scores and softmax are float32.

  Raises:
    ValueError: unknown implementation; a dtype or a head size that a kernel
      does not take, if asked for by name.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} should be one of {IMPLEMENTATIONS}"
    )
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if implementation == "dense" or q.shape[1] <= block:
    return _dense(q, k, v, key_start, key_end, window, scale, cap)
  if implementation == "auto":
    implementation = choose(q.dtype, q.shape[-1])
  inputs = q, k, v, key_start, key_end
  options = {"window": window, "scale": scale, "cap": cap}
  if implementation in KERNELS:
    return KERNELS[implementation].flash_attention(*inputs, **options)
  return blockwise_attention(*inputs, **options, block=block)


def choose(dtype: Any, head_dim: int, device: Any = None) -> str:
  """The fastest implementation that a device runs.

  Args:
    dtype: of q, k and v.
    head_dim: their last axis.
    device: as of `jax.devices`; None is the first of them.

  Returns:
    "triton" on NVIDIA GPUs from compute capability 8.0 on, "mosaic" on TPUs
    (where these take the dtype and the head), else "blockwise".
  """
  device = jax.devices()[0] if device is None else device
  for name, kernel in KERNELS.items():
    if is_native(name, device) and not kernel.why_not(dtype, head_dim):
      return name
  return "blockwise"


def is_native(implementation: str, device: Any) -> bool:
  """Whether a device runs an implementation as it is meant to be run."""
  if implementation == "mosaic":
    return device.platform == "tpu"
  if implementation == "triton":
    return device.platform == "gpu" and _capability(device) >= 8
  return True


def _capability(device):
  """Compute capability of an NVIDIA GPU, 0 of others."""
  try:
    return float(device.compute_capability)
  except (AttributeError, ValueError):  # AMD's are names
    return 0.0


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
