"""Which blocks of keys meet which blocks of queries, for kernels to skip by.

Letters: B rows, T queries, U keys, N blocks of queries, M blocks of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.blockwise import Window

_FAR = 2**31 - 1


class Bounds(NamedTuple):
  """For every block the blocks `[first, last)` that it meets; `last == first`
  where there are none. What lies between them may still be unseen: it is masked
  like everything else."""

  first: jax.Array  # i32[B N]
  last: jax.Array  # i32[B N]


def padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """x, with zeros up to a multiple along one axis."""
  short = -x.shape[axis] % multiple
  if not short:
    return x
  return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)])


def bounds(
  key_start: jax.Array,
  key_end: jax.Array,
  window: Window | None,
  keys: int,
  query_block: int,
  key_block: int,
) -> tuple[Bounds, Bounds]:
  """Blocks of keys of each block of queries, and the other way round.

  Args:
    key_start: i32[B T], T a multiple of `query_block`.
    key_end: i32[B T].
    window: hides keys by position, or None.
    keys: U, a multiple of `key_block`.
    query_block: T / N.
    key_block: U / M.

  Returns:
    Bounds[B N] in blocks of keys, Bounds[B M] in blocks of queries.
  """
  rows = key_start.shape[0]

  def of_queries(x, unseen, reduce):
    x = jnp.where(key_end > key_start, x, unseen)
    return reduce(x.reshape(rows, -1, query_block), axis=2)[..., None]

  low = jnp.arange(keys // key_block) * key_block
  meet = of_queries(key_start, keys, jnp.min) < low + key_block
  meet &= of_queries(key_end, 0, jnp.max) > low
  if window is not None:
    newest = window.positions.reshape(rows, -1, key_block).max(axis=2)
    meet &= newest[:, None] >= of_queries(window.oldest, _FAR, jnp.min)
  return _ends(meet), _ends(meet.swapaxes(1, 2))


def _ends(meet):
  """bool[B N M] to the first and past the last that is true."""
  count = meet.shape[2]
  first = jnp.argmax(meet, axis=2)
  last = count - jnp.argmax(meet[..., ::-1], axis=2)
  last = jnp.where(meet.any(axis=2), last, first)
  return Bounds(first.astype(jnp.int32), last.astype(jnp.int32))
