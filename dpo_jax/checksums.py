"""Checksums of arrays that lie on many devices.

64 bits an array, computed where the array lies and the same for every mesh and
number of processes: each element's bits are mixed with its position, and the
mixed words are added modulo 2**32, in which no order and no grouping matters.
A change to any one element always shows: mixing one word is a bijection.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.offload import fetched, lies_on_host

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_GOLDEN = 0x9E3779B1  # odd multipliers and shifts as in MurmurHash3


def of_tree(tree: Any) -> dict[str, str]:
  """Path of each array -> its checksum, 16 hexadecimal digits.

  Args:
    tree: arrays of 1, 2, 4 or 8 bytes an element, sharded or not; with many
      processes all of them must call.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  there = [isinstance(x, jax.Array) and lies_on_host(x) for _, x in leaves]
  sums = iter(
    _sums([x for (_, x), host in zip(leaves, there, strict=True) if not host])
  )
  # One by one: all of what lies on the host may not fit the device.
  sums = jax.device_get(
    [
      _sums([x])[0] if host else next(sums)
      for (_, x), host in zip(leaves, there, strict=True)
    ]
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{int(a):08x}{int(b):08x}"
    )
    for (path, _), (a, b) in zip(leaves, sums, strict=True)
  }


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_sum(x) for x in fetched(leaves)]


def _sum(x: jax.Array) -> jax.Array:
  """u32[2] of an array."""
  words = _words(x)
  place = _positions(words.shape)
  return jnp.stack(
    [
      jnp.sum(_mix(words ^ _mix(place + jnp.uint32(seed))), dtype=jnp.uint32)
      for seed in (0, 0x51ED270B)
    ]
  )


def _words(x: jax.Array) -> jax.Array:
  """The bits as u32, with a last axis of two where an element has 8 bytes."""
  width = jnp.dtype(x.dtype).itemsize
  if not jnp.issubdtype(x.dtype, jnp.floating) and width < 4:
    return x.astype(jnp.int32).astype(jnp.uint32)  # some have 4 bits, or one
  if width == 8:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, _WORDS[width]).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
  """u32 of that shape: how far each element lies from the first."""
  strides = [
    functools.reduce(lambda a, b: a * b % 2**32, shape[i + 1 :], 1)
    for i in range(len(shape))
  ]
  place = jnp.zeros(shape, jnp.uint32)
  for axis, stride in enumerate(strides):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    place += along * jnp.uint32(stride)
  return place


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of u32 that spreads each bit over all."""
  x = (x ^ (x >> 16)) * jnp.uint32(_GOLDEN)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
