"""Attention a block at a time, in plain JAX: skips what no query sees.

An online softmax runs over blocks of keys for each block of queries, between
the first and the last key that any query of the block sees; the backward
recomputes scores from the saved log-sum-exp (Dao et al. 2022, 2205.14135). No
[T, U] array exists, and packed rows cost about what their pairs cost.

Letters: N blocks of queries, B rows, q queries a block, K kv heads, G queries'
heads per kv head, u keys a block, h head dim; R = G q.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.models.kept import kept

MASKED = -1e30  # finite: a row of it stays finite under softmax


class Window(NamedTuple):
  """What of its range of keys a query sees, by position and not by place."""

  oldest: jax.Array  # i32[B T], the earliest position that a query sees
  positions: jax.Array  # i32[B U], of the keys


def blockwise_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  key_start: jax.Array,
  key_end: jax.Array,
  *,
  window: Window | None = None,
  scale: float,
  cap: float | None = None,
  block: int = 128,
  key_block: int = 64,
) -> jax.Array:
  """See `attention.attention`; f[B T H h] and f[B U K h] -> f[B T H h]."""
  B, T, H, h = q.shape
  U, K = k.shape[1:3]
  G, queries, keys = H // K, -(-T // block), -(-U // key_block)

  def blocks(x, n, block):
    """[B T ...] -> [n B block ...]; padded queries see nothing."""
    short = n * block - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, n, block, *x.shape[2:]), 1, 0)

  q = blocks(q, queries, block).reshape(queries, B, block, K, G, h)
  q = q.transpose(0, 1, 3, 4, 2, 5).reshape(queries, B, K, G * block, h)
  k, v = (blocks(x, keys, key_block).transpose(0, 1, 3, 2, 4) for x in (k, v))
  start, end = (blocks(x, queries, block) for x in (key_start, key_end))
  seen = end > start
  first = jnp.where(seen, start, U).min(axis=(1, 2)) // key_block
  last = -(-jnp.where(seen, end, 0).max(axis=(1, 2)) // key_block)
  oldest = at = None
  if window is not None:
    oldest = blocks(window.oldest, queries, block)
    at = blocks(window.positions, keys, key_block)
  out = _attend(q, k, v, ((start, end, oldest), (first, last), at), scale, cap)
  out = out.reshape(queries, B, K, G, block, h).transpose(1, 0, 4, 2, 3, 5)
  return out.reshape(B, queries * block, H, h)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, ranges, scale, cap):
  """q f[N B K R h], k and v f[. B K u h] -> f[N B K R h]."""
  return _forward(q, k, v, ranges, scale, cap)[0]


def _wide(x):
  """What sums are kept in: float32, or wider if x is."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _dot(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=_wide(a))


def _scores(q, k, seen, at, j, scale, cap):
  """f[B K R h] and key block j, f[B K u h], to scores f32[B K R u]; and to the
  derivative of the cap, or 1."""
  start, end, oldest = seen
  scores, slope = _dot("bkrh,bkuh->bkru", q, k[j]) * scale, 1
  if cap is not None:
    bent = jnp.tanh(scores / cap)
    scores, slope = cap * bent, 1 - bent * bent
  keys = j * k.shape[3] + jnp.arange(k.shape[3])
  visible = (keys >= start[..., None]) & (keys < end[..., None])
  if oldest is not None:
    visible &= at[j][:, None] >= oldest[..., None]
  groups = q.shape[2] // start.shape[1]
  visible = jnp.tile(visible, (1, groups, 1))[:, None]
  return jnp.where(visible, scores, MASKED), slope


def _forward(q, k, v, ranges, scale, cap):
  seen, bounds, at = ranges

  def one_block(_, xs):
    q, seen, (first, last) = xs

    def add_keys(j, carry):
      top, total, out = carry
      scores, _ = _scores(q, k, seen, at, j, scale, cap)
      new_top = jnp.maximum(top, scores.max(axis=-1))
      probs = jnp.exp(scores - new_top[..., None])
      shrink = jnp.exp(top - new_top)
      total = total * shrink + probs.sum(axis=-1)
      new = _dot("bkru,bkuh->bkrh", probs.astype(v.dtype), v[j])
      return new_top, total, out * shrink[..., None] + new

    # Above any masked score, so that masked keys weigh nothing even where a
    # query has seen no key yet.
    top = jnp.full(q.shape[:3], MASKED / 2, _wide(q))
    nothing = top, jnp.zeros_like(top), jnp.zeros(q.shape, _wide(q))
    top, total, out = jax.lax.fori_loop(first, last, add_keys, nothing)
    total = jnp.maximum(total, 1e-30)
    out = (out / total[..., None]).astype(q.dtype)
    return None, (out, top + jnp.log(total))

  _, (out, lse) = jax.lax.scan(one_block, None, (q, seen, bounds))
  out, lse = kept((out, lse))
  return out, (q, k, v, ranges, out, lse)


def _backward(scale, cap, residuals, g):
  q, k, v, (seen, bounds, at), out, lse = residuals
  delta = (g.astype(_wide(g)) * out).sum(axis=-1)

  def one_block(carry, xs):
    q, seen, (first, last), lse, delta, g = xs

    def add_keys(j, carry):
      dq, dk, dv = carry
      scores, slope = _scores(q, k, seen, at, j, scale, cap)
      probs = jnp.exp(scores - lse[..., None])
      dv = dv.at[j].add(_dot("bkru,bkrh->bkuh", probs.astype(g.dtype), g))
      dprobs = _dot("bkrh,bkuh->bkru", g, v[j])
      dscores = probs * (dprobs - delta[..., None]) * slope * scale
      dscores = dscores.astype(q.dtype)
      dq += _dot("bkru,bkuh->bkrh", dscores, k[j])
      dk = dk.at[j].add(_dot("bkru,bkrh->bkuh", dscores, q))
      return dq, dk, dv

    dq = jnp.zeros(q.shape, _wide(q))
    dq, *carry = jax.lax.fori_loop(first, last, add_keys, (dq, *carry))
    return tuple(carry), dq.astype(q.dtype)

  zeros = jnp.zeros(k.shape, _wide(k)), jnp.zeros(v.shape, _wide(v))
  blocks = q, seen, bounds, lse, delta, g
  (dk, dv), dq = jax.lax.scan(one_block, zeros, blocks)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
