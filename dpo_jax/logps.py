"""Log-probs of scored tokens from hidden states, without keeping logits.

Logits exist for one tile of rows at a time, in float32, forward and backward;
nothing of the size of the vocabulary is kept between the two.
"""

import jax
import jax.numpy as jnp


def token_logps(
  hidden: jax.Array, head: jax.Array, targets: jax.Array, *, tile: int = 1024
) -> jax.Array:
  """log softmax(hidden @ head.T)[target], tile by tile.

  Args:
    hidden: f[N D], in the compute dtype.
    head: f[V D], the unembedding, in the same dtype.
    targets: i32[N], token ids in [0, V).
    tile: rows of logits alive at once; each is computed over the whole
      vocabulary in one product, so memory is `tile * V` floats.

  Returns:
    f32[N]. Products accumulate in float32 and the log-sum-exp is float32,
    whatever dtype comes in.
  """
  rows = hidden.shape[0]
  tiles = -(-rows // tile)
  tile = -(-rows // tiles)
  pad = tiles * tile - rows
  hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(tiles, tile, -1)
  targets = jnp.pad(targets, (0, pad)).reshape(tiles, tile)
  return _tiled_logps(hidden, head, targets).reshape(-1)[:rows]


def sum_by_slot(
  token_logps: jax.Array, slot: jax.Array, examples: int
) -> jax.Array:
  """Sums log-probs per response: f[B S], i32[B S] -> f32[B M 2].

  A masked reduction and not a scatter: it adds in the same order for policy and
  reference on every device, so equal models give equal sums to the last bit.
  """
  slots = jnp.arange(2 * examples)
  mine = slot[:, :, None] == slots  # bool[B S 2M]
  sums = jnp.where(mine, token_logps[:, :, None], 0).sum(axis=1)
  return sums.reshape(slot.shape[0], examples, 2)


def lengths_by_slot(slot: jax.Array, examples: int) -> jax.Array:
  """Scored tokens per response: i32[B S] -> f32[B M 2]."""
  return sum_by_slot(jnp.ones(slot.shape, jnp.float32), slot, examples)


@jax.custom_vjp
def _tiled_logps(hidden, head, targets):
  return _forward(hidden, head, targets)[0]


def _logits(hidden, head):
  # f32 out of the product itself: rounding logits to bf16 costs tenths of a
  # nat over a few hundred tokens.
  return jnp.einsum(
    "nd,vd->nv", hidden, head, preferred_element_type=jnp.float32
  )


def _forward(hidden, head, targets):
  def one_tile(_, xs):
    h, y = xs
    logits = _logits(h, head)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]
    return None, (picked - lse, lse)

  _, (logps, lse) = jax.lax.scan(one_tile, None, (hidden, targets))
  return logps, (hidden, head, targets, lse)


def _backward(residuals, g):
  hidden, head, targets, lse = residuals
  vocabulary = jnp.arange(head.shape[0])

  def one_tile(dhead, xs):
    h, y, z, g = xs
    probs = jnp.exp(_logits(h, head) - z[:, None])
    dlogits = jnp.where(vocabulary == y[:, None], 1.0, 0.0) - probs
    # In the compute dtype, or both products below would run in float32.
    dlogits = (g[:, None] * dlogits).astype(h.dtype)
    dh = jnp.einsum("nv,vd->nd", dlogits, head)
    dhead += jnp.einsum(
      "nv,nd->vd", dlogits, h, preferred_element_type=jnp.float32
    )
    return dhead, dh

  zero = jnp.zeros(head.shape, jnp.float32)
  dhead, dhidden = jax.lax.scan(one_tile, zero, (hidden, targets, lse, g))
  return dhidden, dhead.astype(head.dtype), None


_tiled_logps.defvjp(_forward, _backward)
