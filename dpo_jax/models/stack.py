"""Layers taken one by one out of the stack of their weights.

A scan over a part of a stack needs a copy of that part. Taken by index, every
layer is read from the whole stack where it is used; but the gradient of that
would be a stack for each layer, to be added up. Here gradients go to a sink,
zeros like the stack that go from layer to layer and that nothing reads: on the
way back each layer writes its own gradient into it, in place.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import offload

Tree = Any


def open_stack(stacked: Tree) -> tuple[Tree, Tree]:
  """A stack of arrays [L ...] without gradient, and the sink that has it."""
  sinks = jax.tree.map(
    lambda x: _sink(x) if _moves(x) else jnp.zeros(()), stacked
  )
  return jax.lax.stop_gradient(stacked), sinks


def take_layer(stack: Tree, sinks: Tree, index: Any) -> tuple[Tree, Tree]:
  """Layer `index` of an open stack, and the sink for the layers after it. Each
  layer is to be taken once, in order."""
  leaves, tree = jax.tree.flatten(stack)
  taken = [
    _take(x, sink, index) if _moves(x) else (_at(x, index), sink)
    for x, sink in zip(leaves, jax.tree.leaves(sinks), strict=True)
  ]
  layer, sinks = zip(*taken, strict=True)
  return tree.unflatten(layer), tree.unflatten(sinks)


def _moves(x):
  """Whether there are gradients: packed weights are integers, and what lies in
  host memory is not trained."""
  return jnp.issubdtype(x.dtype, jnp.inexact) and not offload.is_there(x)


def _at(x, index):
  return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


_sink = jax.custom_vjp(lambda x: jnp.zeros_like(x))
_sink.defvjp(lambda x: (jnp.zeros_like(x), None), lambda _, g: (g,))

_take = jax.custom_vjp(lambda x, sink, index: (_at(x, index), sink))
_take.defvjp(
  lambda x, sink, index: ((_at(x, index), sink), index),
  lambda index, g: (
    None,
    jax.lax.dynamic_update_index_in_dim(g[1], g[0], index, 0),
    None,
  ),
)
