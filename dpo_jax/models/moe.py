"""A mixture of experts: each token goes through k of E gated MLPs.

Every token goes to the experts it chose: there is no capacity, nothing is
dropped, and so no token has a say in what becomes of another.

Letters: B rows, T tokens, N = B T, D width, F ffn of an expert, E experts,
k experts a token.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models import grouped
from dpo_jax.models.kept import kept
from dpo_jax.models.layers import ACTIVATIONS, Dtype

ROUTER = "router"  # the collection that holds what `balance` needs


class RoutedMLP(nn.Module):
  """The k likeliest experts' outputs, weighted by the router; f[B T D] ->
  f[B T D].

  Into the collection "router", where that is mutable, it sows per row, over
  the tokens that are there: `load` f32[B E], how many chose an expert, `probs`
  f32[B E], the router's summed probabilities, and `tokens` f32[B].
  """

  width: int
  ffn: int
  experts: int
  experts_per_token: int
  norm_topk: bool = True  # the k weights of a token add up to 1
  activation: str = "silu"  # one of ACTIVATIONS
  param_dtype: Dtype = jnp.float32
  # Wraps the experts for a mesh, see `sharding.Pins.experts`.
  place: Callable[[Any], Any] = lambda function: function

  @nn.compact
  def __call__(self, x: jax.Array, there: jax.Array) -> jax.Array:
    """Args:
    x: f[B T D].
    there: bool[B T], False for padding, which counts for nothing.
    """
    router = self.param("router", self._init_router)["kernel"]
    kernels = self.param("experts", self._init_experts)
    if self.is_initializing():
      return x  # weights do not depend on it
    logits = jnp.einsum(
      "btd,de->bte", x, router.astype(x.dtype),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    # Kept, as how tokens are routed is not to depend on its being made again.
    probs = kept(jax.nn.softmax(logits, axis=-1))
    run = functools.partial(
      run_experts, k=self.experts_per_token, norm_topk=self.norm_topk,
      activation=ACTIVATIONS[self.activation],
    )  # fmt: skip
    kernels = jax.tree.map(lambda w: w.astype(x.dtype), kernels)
    y, chosen = self.place(run)(x, probs, kernels)
    if self.is_mutable_collection(ROUTER):
      # Sums of whole numbers, exact in float32 up to 2^24 a row.
      votes = (chosen[..., None] == jnp.arange(self.experts)).sum(axis=2)
      for name, each in (
        ("load", votes), ("probs", probs), ("tokens", jnp.ones_like(there)),
      ):  # fmt: skip
        mask = there.reshape(*there.shape, *(1,) * (each.ndim - 2))
        each = jnp.where(mask, each, 0).astype(jnp.float32)
        self.sow(ROUTER, name, each.sum(axis=1))
    return y

  def _init_router(self, rng):
    init = nn.initializers.lecun_normal()
    return {"kernel": init(rng, (self.width, self.experts), self.param_dtype)}

  def _init_experts(self, rng):
    init = nn.initializers.variance_scaling(
      1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0
    )
    wide = (self.experts, self.width, self.ffn)
    shapes = {"gate": wide, "up": wide, "down": (wide[0], *wide[:0:-1])}
    return {
      name: {"kernel": init(rng, shapes[name], self.param_dtype)}
      for name, rng in zip(shapes, jax.random.split(rng, len(shapes)))
    }


def run_experts(
  x: jax.Array,
  probs: jax.Array,
  kernels: Any,
  *,
  k: int,
  norm_topk: bool,
  activation: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Chooses experts and runs them, on one device's tokens.

  Args:
    x: f[B T D].
    probs: f32[B T E]; of equals, the first experts are chosen.
    kernels: `gate` and `up` f[E D F] and `down` f[E F D], each a dict with
      `kernel`, in the dtype of x. Where F is split over devices, the outputs
      of these are to be added.
    k: experts a token.
    norm_topk: the chosen probabilities are made to add up to 1.
    activation: of the gates.

  Returns:
    f[B T D] and the chosen experts i32[B T k], the likeliest first.
  """
  weights, chosen = jax.lax.top_k(probs, k)
  if norm_topk:
    weights /= weights.sum(axis=-1, keepdims=True)
  blocks = kept(grouped.lay_out(chosen.reshape(-1, k), probs.shape[-1]))
  to = lambda x, name: kept(
    grouped.product(x, kernels[name]["kernel"], blocks.group)
  )
  rows = grouped.to_blocks(x.reshape(-1, x.shape[-1]), blocks)
  rows = to(activation(to(rows, "gate")) * to(rows, "up"), "down")
  y = jnp.einsum(
    "nkd,nk->nd", grouped.from_blocks(rows, blocks),
    weights.reshape(-1, k).astype(x.dtype),
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  return y.astype(x.dtype).reshape(x.shape), chosen


def balance(load: jax.Array, probs: jax.Array, tokens: jax.Array) -> jax.Array:
  """The loss that keeps experts equally busy: E * sum_e f_e P_e.

  Switch Transformer, https://arxiv.org/abs/2101.03961, eq. 4 to 6, over the
  tokens of all layers together. f_e is the share of tokens that chose expert e,
  so that the f_e add up to k and a balanced router has k; P_e is the mean
  probability of e. Only P has a gradient.

  Args:
    load: f32[B E], of each row (or of any other part of the batch).
    probs: f32[B E].
    tokens: f32[B].

  Returns:
    f32[], 0 where there is no token.
  """
  experts, count = load.shape[-1], jnp.maximum(tokens.sum(), 1)
  share = jax.lax.stop_gradient(load.sum(axis=0)) / count
  return experts * (share * (probs.sum(axis=0) / count)).sum()
