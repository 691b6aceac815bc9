"""Layers that the model families share.

Letters: B rows, T tokens, D width, H heads, K kv heads, h head dim, F ffn.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.attention import attention
from dpo_jax.models.rope import apply_rope

Dtype = Any


class RMSNorm(nn.Module):
  """Root-mean-square normalisation in float32; f[... D] -> f[... D]."""

  epsilon: float
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
      "scale", nn.initializers.ones, x.shape[-1:], self.param_dtype
    )
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    return (y * scale).astype(x.dtype)


class Projection(nn.Module):
  """A linear map from the trailing axes `inputs` to `outputs`."""

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  use_bias: bool = False
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inner = tuple(range(len(self.inputs)))
    init = nn.initializers.variance_scaling(
      1.0, "fan_in", "normal", in_axis=inner,
      out_axis=tuple(range(len(inner), len(inner) + len(self.outputs))),
    )  # fmt: skip
    kernel = self.param(
      "kernel", init, (*self.inputs, *self.outputs), self.param_dtype
    )
    # One plain matrix product: on CPU the backward of a product over several
    # axes is a sixth slower.
    matrix = kernel.astype(x.dtype).reshape(math.prod(self.inputs), -1)
    y = x.reshape(-1, matrix.shape[0]) @ matrix
    y = y.reshape(*x.shape[: x.ndim - len(inner)], *self.outputs)
    if self.use_bias:
      bias = self.param(
        "bias", nn.initializers.zeros, self.outputs, self.param_dtype
      )
      y += bias.astype(x.dtype)
    return y


class SelfAttention(nn.Module):
  """Grouped-query attention with rotary positions over key ranges."""

  width: int
  heads: int
  kv_heads: int
  head_dim: int
  freqs: tuple[float, ...]  # hashable form of rope_frequencies
  use_bias: bool = False
  implementation: str = "blockwise"
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    key_start: jax.Array,
    key_end: jax.Array,
    cache: tuple[jax.Array, jax.Array] | None = None,
    cache_index: jax.Array | int = 0,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Attends over the row itself, or over a cache that the row is added to.

    Args:
      x: f[B T D].
      positions: i32[B T].
      key_start: i32[B T], indices into the row, or into the cache.
      key_end: i32[B T].
      cache: keys and values f[B U K h] so far, or None.
      cache_index: where in the cache this row's T tokens belong.

    Returns:
      f[B T D] and the cache with this row in it.
    """

    def project(name, heads):
      return Projection(
        (self.width,), (heads, self.head_dim), self.use_bias,
        self.param_dtype, name=name,
      )(x)  # fmt: skip

    freqs = np.asarray(self.freqs, np.float32)
    q = apply_rope(project("q", self.heads), positions, freqs)
    k = apply_rope(project("k", self.kv_heads), positions, freqs)
    v = project("v", self.kv_heads)
    if cache is not None:
      at = (0, cache_index, 0, 0)
      k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), at)
      v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), at)
      cache = k, v
    y = attention(
      q, k, v, key_start, key_end, implementation=self.implementation
    )
    out = Projection(
      (self.heads, self.head_dim), (self.width,), self.use_bias,
      self.param_dtype, name="o",
    )(y)  # fmt: skip
    return out, cache


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x)); f[B T D] -> f[B T D]."""

  width: int
  ffn: int
  use_bias: bool = False
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def project(name, n, m):
      return Projection((n,), (m,), self.use_bias, self.param_dtype, name=name)

    gate = project("gate", self.width, self.ffn)(x)
    up = project("up", self.width, self.ffn)(x)
    return project("down", self.ffn, self.width)(nn.silu(gate) * up)
