"""Products of rows with the matrix of the group that each row belongs to.

Rows are sorted by group and each group is filled up to whole blocks, so that a
block meets one matrix and a scan goes over blocks: the work is that of the
rows, some filling apart, and not of rows times groups, which is what
`jax.lax.ragged_dot` becomes wherever the compiler has no kernel for it (it
masks and multiplies with every matrix). As the dropless layers of MegaBlocks,
https://arxiv.org/abs/2211.15841. No row is dropped and none sees another.

Letters: N rows, k groups a row, E groups, C blocks of b rows, D in, F out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SMALLEST, LARGEST = 3, 9  # blocks of 8 to 512 rows, as powers of 2


class Blocks(NamedTuple):
  """Which row lies where among the blocks, and the way back."""

  source: jax.Array  # i32[C b], the row that lies there; N: none does
  pick: jax.Array  # i32[C b 1], which of the N k picks it is; N k: none
  place: jax.Array  # i32[N k], where each pick lies, in 0 .. C b
  group: jax.Array  # i32[C], of each block


def block_size(picks: int, groups: int) -> int:
  """A quarter of an even share: the last, partly filled block of each group
  then costs little, and matrices are still read for many rows at once."""
  power = max(picks // (4 * groups), 1).bit_length() - 1
  return 2 ** min(max(power, SMALLEST), LARGEST)


def lay_out(chosen: jax.Array, groups: int) -> Blocks:
  """Sorts the picks i32[N k] of groups into blocks of one group each."""
  rows, k = chosen.shape
  picks, size = rows * k, block_size(rows * k, groups)
  count = picks // size + min(groups, picks)  # as many as it can ever take
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  ordered = flat[order]
  starts = jnp.searchsorted(ordered, jnp.arange(groups + 1))
  blocks = -(-jnp.diff(starts) // size)
  ends = jnp.cumsum(blocks)
  shift = size * (ends - blocks) - starts[:-1]  # of each group's rows
  where = jnp.arange(picks) + shift[ordered]
  pick = jnp.full(count * size, picks).at[where].set(order)
  place = jnp.zeros_like(order).at[order].set(where)
  group = jnp.searchsorted(ends, jnp.arange(count), side="right")
  return Blocks(
    pick // k, pick[:, None], place.reshape(rows, k),
    jnp.minimum(group, groups - 1),
  )  # fmt: skip


def to_blocks(x: jax.Array, blocks: Blocks) -> jax.Array:
  """f[N D] -> f[C b D], each row once per pick; 0 where there is none."""
  count = blocks.group.shape[0]
  return _take(x, blocks.source, blocks.place).reshape(count, -1, x.shape[-1])


def from_blocks(y: jax.Array, blocks: Blocks) -> jax.Array:
  """f[C b D] -> f[N k D], what became of each pick."""
  return _take(y.reshape(-1, y.shape[-1]), blocks.place, blocks.pick)


@jax.custom_vjp
def _take(x, index, back):
  """x[index], 0 beyond its end. Its gradient gathers likewise, by `back` (the
  places [rows m] that each row went to): it adds in one order always."""
  return x.at[index].get(mode="fill", fill_value=0)


def _take_forward(x, index, back):
  return _take(x, index, back), back


def _take_backward(back, g):
  g = g.reshape(-1, g.shape[-1])
  return _take(g, back, None).sum(axis=1), None, None


_take.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, group: jax.Array) -> jax.Array:
  """Each block with its group's matrix.

  Args:
    x: f[C b D].
    w: f[E D F], in the same dtype.
    group: i32[C].

  Returns:
    f[C b F].
  """

  def one(_, block):
    x, e = block
    return None, x @ jax.lax.dynamic_index_in_dim(w, e, keepdims=False)

  return jax.lax.scan(one, None, (x, group))[1]


def _product_forward(x, w, group):
  return product(x, w, group), (x, w, group)


def _product_backward(residuals, g):
  x, w, group = residuals

  def one(dw, block):  # adds up in float32, whatever dtype comes in
    x, g, e = block
    more = jnp.einsum("bd,bf->df", x, g, preferred_element_type=jnp.float32)
    more += jax.lax.dynamic_index_in_dim(dw, e, keepdims=False)
    dw = jax.lax.dynamic_update_index_in_dim(dw, more, e, 0)
    return dw, g @ jax.lax.dynamic_index_in_dim(w, e, keepdims=False).T

  zeros = jnp.zeros(w.shape, jnp.float32)
  dw, dx = jax.lax.scan(one, zeros, (x, g, group))
  return dx, dw.astype(w.dtype), None


product.defvjp(_product_forward, _product_backward)
