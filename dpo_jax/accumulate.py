"""Gradients of a batch in parts, equal to those of the whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.batch import Batch, Scores

Tree = Any


def accumulate(
  policy: Callable[[Tree, Batch, Any], Scores],
  reference: Callable[[Batch], Scores | None],
  objective: Callable[..., tuple[jax.Array, Tree]],
  params: Tree,
  batch: Batch,
  microbatches: int,
  *,
  coupled: bool,
  whole: Callable[[Tree, Batch, Any], tuple[jax.Array, Tree]] | None = None,
) -> tuple[Tree, Tree]:
  """Gradient by `params` of a sum over the examples of a batch.

  Where each example stands alone, the parts' gradients are added. Where they
  are coupled (KTO's z0 is a mean over the batch), all parts are scored first,
  the objective sees the whole batch and is differentiated by the scores alone,
  and a second pass pulls that back part by part: one more forward, exact.

  Args:
    policy: (params, part, number of the part) -> scores f32[B' M K].
    reference: part -> likewise, or None.
    objective: (policy scores, reference scores, part) -> (sum, auxiliary sums).
    params: what to differentiate by.
    batch: B rows, a multiple of `microbatches`.
    microbatches: number of parts.
    coupled: whether the objective couples examples.
    whole: (params, part, number) -> the objective of the part's scores, where
      that can be had better than from these functions; not if coupled.

  Returns:
    Gradients like `params`, and the auxiliary sums over the batch.
  """

  def scored_first(params, part, number):
    return objective(policy(params, part, number), reference(part), part)

  whole = whole or scored_first
  if microbatches == 1:
    return jax.grad(whole, has_aux=True)(params, batch, 0)
  parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
  numbers = jnp.arange(microbatches)
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

  if not coupled:

    def add_part(carry, part):
      new = jax.grad(whole, has_aux=True)(params, *part)
      return jax.tree.map(jnp.add, carry, new), None

    one = jax.tree.map(lambda x: x[0], parts)
    _, sums = jax.eval_shape(whole, params, one, 0)
    carry = zeros, jax.tree.map(jnp.zeros_like, sums)
    return jax.lax.scan(add_part, carry, (parts, numbers))[0]

  scores = jax.lax.map(
    lambda p: (policy(params, *p), reference(p[0])), (parts, numbers)
  )
  scores = jax.tree.map(_join, scores)
  by_scores, sums = jax.grad(objective, has_aux=True)(*scores, batch)

  def pull_back(carry, xs):
    part, number, g = xs
    _, vjp = jax.vjp(lambda params: policy(params, part, number), params)
    return jax.tree.map(jnp.add, carry, vjp(g)[0]), None

  by_parts = jax.tree.map(lambda g: _split(g, microbatches), by_scores)
  return jax.lax.scan(pull_back, zeros, (parts, numbers, by_parts))[0], sums


def _split(x: jax.Array, n: int) -> jax.Array:
  """[B ...] -> [n B/n ...], taking rows from every device's share."""
  return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)


def _join(x: jax.Array) -> jax.Array:
  """The inverse of `_split`: [n B/n ...] -> [B ...]."""
  x = jnp.swapaxes(x, 0, 1)
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
