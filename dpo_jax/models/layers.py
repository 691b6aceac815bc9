"""Layers that the model families share.

Letters: B rows, T tokens, D width, H heads, K kv heads, h head dim, F ffn.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.attention import KERNELS, attention, choose
from dpo_jax.models.blockwise import Window
from dpo_jax.models.kept import kept
from dpo_jax.models.rope import apply_rope

Dtype = Any
ACTIVATIONS = {  # by the names of config.json
  "silu": nn.silu,
  "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}


@jax.custom_vjp
def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """table f[V D] at tokens i32[...] -> f[... D]; the gradients of a row add up
  in float32, whatever dtype the table has."""
  return table[tokens]


def _look_up_forward(table, tokens):
  return table[tokens], (table, tokens)


def _look_up_backward(residuals, g):
  table, tokens = residuals
  wide = jnp.promote_types(table.dtype, jnp.float32)
  total = jnp.zeros(table.shape, wide).at[tokens].add(g.astype(wide))
  return total.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation in float32; f[... D] -> f[... D]."""

  epsilon: float
  param_dtype: Dtype = jnp.float32
  plus_one: bool = False  # the weight is what the factor exceeds 1 by

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = self.param("scale", start, x.shape[-1:], self.param_dtype)
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    if self.plus_one:
      scale = 1 + scale.astype(jnp.float32)  # 1 + a small bfloat16 rounds
    return (y * scale).astype(x.dtype)


class Projection(nn.Module):
  """A linear map from the trailing axes `inputs` to `outputs`; with an adapter
  (`lora.py`) where the variables hold one."""

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
    if self.has_variable("lora", "a"):
      y += self._adapter(x)
    return kept(y)

  def _adapter(self, x):
    a, b, scale, rate = (
      self.get_variable("lora", name) for name in ("a", "b", "scale", "dropout")
    )
    if self.has_rng("dropout"):
      kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
      x = jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
    low = x.reshape(-1, math.prod(self.inputs)) @ (
      a.reshape(-1, a.shape[-1]).astype(x.dtype)
    )
    y = low @ (b * scale).reshape(b.shape[0], -1).astype(x.dtype)
    return y.reshape(*x.shape[: x.ndim - len(self.inputs)], *self.outputs)


class SelfAttention(nn.Module):
  """Grouped-query attention with rotary positions over key ranges."""

  width: int
  heads: int
  kv_heads: int
  head_dim: int
  use_bias: bool = False  # of q, k and v
  output_bias: bool = False
  # Given a name, a norm over each head of q and k.
  make_norm: Callable[..., nn.Module] | None = None
  scale: float | None = None
  cap: float | None = None
  implementation: str = "auto"
  place: Callable[[Any], Any] = lambda function: function  # what is a kernel
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    freqs: jax.Array,
    key_start: jax.Array,
    key_end: jax.Array,
    window: Window | None = None,
    cache: tuple[jax.Array, jax.Array] | None = None,
    cache_index: jax.Array | int = 0,
    asking: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Attends over the row itself, or over a cache that the row is added to.

    Args:
      x: f[B T D].
      positions: i32[B T].
      freqs: f32[h / 2], as of `rope_frequencies`.
      key_start: i32[B T], indices into the row, or into the cache.
      key_end: i32[B T].
      window: sees less of that range, by position; None: all of it.
      cache: keys and values f[B U K h] so far, or None.
      cache_index: where in the cache this row's T tokens belong.
      asking: tokens f[B S D] and positions i32[B S] to attend from, instead of
        all; ranges and `window.oldest` are then theirs, [B S].

    Returns:
      f[B T D] (or f[B S D]) and the cache with this row in it.
    """

    def project(x, name, heads):
      return Projection(
        (self.width,), (heads, self.head_dim), self.use_bias,
        self.param_dtype, name=name,
      )(x)  # fmt: skip

    from_x, from_positions = (x, positions) if asking is None else asking
    q = project(from_x, "q", self.heads)
    k = project(x, "k", self.kv_heads)
    v = project(x, "v", self.kv_heads)
    if self.make_norm is not None:
      q, k = self.make_norm(name="q_norm")(q), self.make_norm(name="k_norm")(k)
    q = apply_rope(q, from_positions, freqs)
    k = apply_rope(k, positions, freqs)
    if cache is not None:
      at = (0, cache_index, 0, 0)
      k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), at)
      v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), at)
      cache = k, v
    how = self.implementation
    if how == "auto":
      how = choose(q.dtype, self.head_dim)
    attend = functools.partial(
      attention, scale=self.scale, cap=self.cap, implementation=how
    )
    if how in KERNELS:  # which the compiler does not split over devices
      attend = self.place(attend)
    y = attend(q, k, v, key_start, key_end, window=window)
    out = Projection(
      (self.heads, self.head_dim), (self.width,), self.output_bias,
      self.param_dtype, name="o",
    )(y)  # fmt: skip
    return out, cache


class GatedMLP(nn.Module):
  """down(activation(gate(x)) * up(x)); f[B T D] -> f[B T D]."""

  width: int
  ffn: int
  activation: str = "silu"  # one of ACTIVATIONS
  use_bias: bool = False
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def project(name, n, m):
      return Projection((n,), (m,), self.use_bias, self.param_dtype, name=name)

    gate = project("gate", self.width, self.ffn)(x)
    up = project("up", self.width, self.ffn)(x)
    return project("down", self.ffn, self.width)(
      ACTIVATIONS[self.activation](gate) * up
    )
