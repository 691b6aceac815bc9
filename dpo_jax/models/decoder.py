"""The decoder that all families are: their Configs say what differs.

Layers are stacked along a leading axis of every weight and run by one scan, so
the program has one layer's size whatever the depth; or two layers', where only
some tokens are asked for and the last layer runs by itself. What differs
between layers and is no weight, a window or a rotary base, is chosen inside the
scan.

Variables: `params`, and `lora` where there are adapters (`lora.py`); applied
without the latter it is the model without them. A reward model has one vector,
`params/score`, in place of the unembedding.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.models.blockwise import Window
from dpo_jax.models.kept import only_products
from dpo_jax.models.layers import (
  GatedMLP,
  RMSNorm,
  SelfAttention,
  look_up,
)
from dpo_jax.models.moe import ROUTER, RoutedMLP
from dpo_jax.models.rope import rope_frequencies
from dpo_jax.models.shape import Compute, Config
from dpo_jax.models.stack import open_stack, take_layer
from dpo_jax.offload import KIND, fetched

Cache = tuple[jax.Array, jax.Array]
init_score = nn.initializers.normal(0.02)
_INPUT = "block_input"  # what `jax.checkpoint` is told to keep elsewhere
_EVERYTHING = -(2**30)  # the oldest position that a global layer sees


class Block(nn.Module):
  """Pre-norm attention and MLP, each added to the residual stream."""

  config: Config
  compute: Compute

  @nn.compact
  def __call__(
    self, x, positions, freqs, key_start, key_end, window, cache, cache_index,
    queries=None,
  ):  # fmt: skip
    """`queries` i32[B S]: what comes out is f[B S D], of these tokens alone;
    the others are keys and values."""
    c, dtype = self.config, self.compute.param_dtype
    norm = functools.partial(RMSNorm, c.norm_epsilon, dtype, c.norm_plus_one)
    attention_norm = norm(name="attention_norm")
    y, asking = attention_norm(x), None
    if queries is not None:
      take = functools.partial(_take_tokens, queries=queries)
      x, key_start, key_end = take(x), take(key_start), take(key_end)
      asking = attention_norm(x), take(positions)
      if window is not None:
        window = window._replace(oldest=take(window.oldest))
    attention = SelfAttention(
      c.width, c.heads, c.kv_heads, c.head_dim,
      use_bias=c.attention_bias or c.qkv_bias,
      output_bias=c.attention_bias,
      make_norm=norm if c.qk_norm else None,
      scale=c.query_scalar**-0.5,
      cap=c.attention_cap,
      implementation=self.compute.attention,
      place=self.compute.place_attention,
      param_dtype=dtype,
      name="attention",
    )  # fmt: skip
    y, cache = attention(
      y, positions, freqs, key_start, key_end, window, cache, cache_index,
      asking,
    )  # fmt: skip
    x = x + (norm(name="attention_post_norm")(y) if c.post_norms else y)
    y = norm(name="mlp_norm")(x)
    if c.experts is None:
      mlp = GatedMLP(
        c.width, c.ffn, c.activation, c.mlp_bias, dtype, name="mlp"
      )
      y = mlp(y)
    else:
      mlp = RoutedMLP(
        c.width, c.ffn, c.experts, c.experts_per_token, c.norm_topk,
        c.activation, dtype, self.compute.place_experts, name="mlp",
      )  # fmt: skip
      y = mlp(y, key_end > key_start)
    x = x + (norm(name="mlp_post_norm")(y) if c.post_norms else y)
    return x, cache


class Decoder(nn.Module):
  """Tokens to the hidden states that `unembed` turns into logits."""

  config: Config
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    key_start: jax.Array,
    key_end: jax.Array,
    cache: Cache | None = None,
    cache_index: jax.Array | int = 0,
    queries: jax.Array | None = None,
  ) -> jax.Array | tuple[jax.Array, Cache]:
    """Runs the decoder.

    Args:
      tokens: i32[B T].
      positions: i32[B T], rotary positions.
      key_start: i32[B T], first key each token sees (row index, or cache
        index when there is a cache). With a cache it is one number per row,
        where position 0 lies.
      key_end: i32[B T], one past the last.
      cache: f[L B U K h] keys and values of earlier tokens; None to train.
      cache_index: where in the cache these tokens go.
      queries: i32[B S], row indices of the tokens whose hidden states are
        asked for, beyond the row for none; the last layer computes only keys
        and values of the others. None asks for all. Not with a cache.

    Returns:
      f[B T D], or f[B S D] of the queries, normalised; with a cache also the
      cache, these tokens added.
      With experts and a mutable collection "router", what `moe.RoutedMLP`
      sows there, summed over the layers.
    """
    c, compute = self.config, self.compute
    embed = self.param(
      "embed",
      nn.initializers.normal(0.02),
      (c.vocab_size, c.width),
      compute.param_dtype,
    )
    block = Block(c, compute, parent=None)
    if self.is_initializing():
      layers = self.param("layers", functools.partial(_init_layers, block))
    else:  # not as a parameter, whose shape is checked: they may be packed
      layers = self.variables["params"]["layers"]
    if c.scalar_head:
      self.param("score", init_score, (1, c.width), compute.param_dtype)
    elif not c.tied:
      self.param(
        "unembed",
        nn.initializers.normal(0.02),
        (c.vocab_size, c.width),
        compute.param_dtype,
      )
    pin = compute.pin_activations
    if "copies" in self.variables:
      table = self.variables["copies"]["embed"]
      x = compute.place_lookup(look_up)(table, tokens)
    else:
      table = compute.pin_weights({"embed": embed}, compute.dtype)["embed"]
      x = look_up(table, tokens).astype(compute.dtype)
    x = pin(x)
    if c.scaled_embed:  # rounded to the compute dtype, as weights were trained
      x *= jnp.asarray(math.sqrt(c.width), x.dtype)
    window = _window(c, positions, key_start, cache)
    adapters = self.variables.get("lora", {}).get("layers", {})
    keys = None
    if self.has_rng("dropout"):
      keys = jax.random.split(self.make_rng("dropout"), c.layers)
    sows = self.router and self.is_mutable_collection(ROUTER)
    sows = sows and not self.is_initializing()  # variables are weights alone

    def here(weights):
      pinned = compute.pin_weights(fetched(weights), compute.dtype)
      return compute.unpack_weights(pinned)

    def one_layer(x, layer, queries=None):
      (weights, adapters), key, local, cache = layer
      x = checkpoint_name(x, _INPUT)
      freqs, seen = _of_layer(c, local, window)
      out = block.apply(
        {"params": here(weights), "lora": fetched(adapters)},
        x, positions, freqs, key_start, key_end, seen, cache, cache_index,
        queries, mutable=[ROUTER] if sows else False,
        rngs=None if key is None else {"dropout": key},
      )  # fmt: skip
      (x, cache), sown = out if sows else (out, None)
      return pin(x), (cache, sown)

    stack, local = (layers, adapters), jnp.asarray(c.local)
    remat = _remat(compute, stack, queries is not None)
    if queries is None:
      x, (new_cache, sown) = jax.lax.scan(
        remat(one_layer), x, (stack, keys, local, cache)
      )
    else:
      x, sown = _ask_last(remat, one_layer, x, stack, keys, local, queries)
    if sows:
      for name, (each,) in sown[ROUTER]["mlp"].items():
        self.sow(ROUTER, name, each.sum(axis=0))
    norm = RMSNorm(
      c.norm_epsilon, compute.param_dtype, c.norm_plus_one, name="norm"
    )
    return norm(x) if cache is None else (norm(x), new_cache)

  @property
  def logit_cap(self) -> float | None:
    """Logits are cap * tanh(hidden @ unembed.T / cap); None: as they are."""
    return self.config.logit_cap

  @property
  def router(self) -> bool:
    """Whether tokens are routed to experts."""
    return self.config.experts is not None

  @nn.nowrap
  def spread(self, variables: Any) -> Any:
    """Variables to use in one pass: on a mesh with the collection `copies` of
    embedding and unembedding, which are one array where these are tied, so that
    it is gathered once and its gradient added up once. What lies in host
    memory is brought from there, but for the layers, which come one by one."""
    variables = {
      collection: {
        name: part if name == "layers" else fetched(part)
        for name, part in parts.items()
      }
      for collection, parts in variables.items()
    }
    copy, dtype = self.compute.copy_weights, self.compute.dtype
    if copy is None:
      return variables
    params = variables["params"]
    names = [name for name in ("embed", "unembed") if name in params]
    copies = {name: copy(params[name], dtype) for name in names}
    return variables | {"copies": copies}

  @nn.nowrap
  def unembed(self, variables: Any) -> jax.Array:
    """The output embedding, f[V D] in the compute dtype, or its copies."""
    name = "embed" if self.config.tied else "unembed"
    if "copies" in variables:
      return variables["copies"][name]
    return variables["params"][name].astype(self.compute.dtype)

  @nn.nowrap
  def score_head(self, variables: Any) -> jax.Array:
    """What the hidden states of a reward model are multiplied by for its
    scores, f32[D]; they are not rounded to the compute dtype."""
    return variables["params"]["score"][0].astype(jnp.float32)

  @nn.nowrap
  def init_variables(self, rng: jax.Array) -> Any:
    """Random weights, `{"params": ...}`."""
    one = jnp.zeros((1, 1), jnp.int32)
    return self.init(rng, one, one, one, one + 1)

  @nn.nowrap
  def empty_cache(self, rows: int, length: int) -> Cache:
    """Keys and values of nothing yet, for `rows` rows of `length` tokens."""
    c = self.config
    shape = (c.layers, rows, length, c.kv_heads, c.head_dim)
    return (jnp.zeros(shape, self.compute.dtype),) * 2


def _take_tokens(x: jax.Array, queries: jax.Array) -> jax.Array:
  """[B T ...] at i32[B S] -> [B S ...]; 0 beyond the row."""
  index = queries.reshape(*queries.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def _ask_last(remat, one_layer, x, stack, keys, local, queries):
  """All layers but the last, and that at the queries only."""
  stack, sinks = open_stack(stack)
  last = len(local) - 1

  def run(carry, layer, queries=None):
    (x, sinks), (index, *rest) = carry, layer
    weights, sinks = take_layer(stack, sinks, index)
    x, (_, sown) = one_layer(x, (weights, *rest, None), queries)
    return (x, sinks), sown

  each = jnp.arange(last + 1), keys, local
  first, final = (
    jax.tree.map(lambda y, at=at: y[at], each) for at in (slice(last), last)
  )
  carry, sown = jax.lax.scan(remat(run), (x, sinks), first)
  # Outside of a scan the compiler would merge what is computed again.
  run_last = functools.partial(run, queries=queries)
  (x, _), more = remat(run_last, prevent_cse=True)(carry, final)
  return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), sown, more)


def _remat(compute: Compute, stack: Any, slices: bool) -> Any:
  """What a layer is wrapped in. `slices`: it takes its weights out of the
  stack itself."""
  policy = None
  if compute.remat == "offload":
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT],
      offload_src="device", offload_dst=KIND,
    )  # fmt: skip
  elif compute.remat == "minimal":
    policy = only_products
  elif compute.remat == "none":
    if not (compute.pin_again or slices):
      return lambda function: function
    policy = _all_but_weights(stack)
  return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)


def _all_but_weights(stack: Any) -> Any:
  """A policy of `jax.checkpoint`: keeps for the backward all that it would keep
  without one, but not what is made of these weights alone."""
  copying = ("convert_element_type", "reshape", "sharding_constraint",
             "custom_vjp_call", "dynamic_slice", "squeeze")  # fmt: skip
  shapes = set()
  for w in jax.tree.leaves(stack):
    shapes |= {w.shape, (1, *w.shape[1:]), w.shape[1:]}

  def kept(primitive, *inputs, **_):
    return not (primitive.name in copying and inputs[0].shape in shapes)

  return kept


def _init_layers(block: Block, rng: jax.Array) -> Any:
  x = jnp.zeros((1, 1, block.config.width), block.compute.dtype)
  one = jnp.zeros((1, 1), jnp.int32)
  freqs = jnp.zeros(block.config.head_dim // 2)

  def init(rng):
    return block.init(rng, x, one, freqs, one, one + 1, None, None, 0)["params"]

  return jax.vmap(init)(jax.random.split(rng, block.config.layers))


def _window(c, positions, key_start, cache):
  """What local layers see, or None where no row is longer than the window."""
  keys = positions.shape[1] if cache is None else cache[0].shape[2]
  if not any(c.local) or keys <= c.window:
    return None
  at = positions
  if cache is not None:
    at = jnp.arange(keys, dtype=positions.dtype) - key_start[:, :1]
  return Window(positions - c.window + 1, at)


def _of_layer(c, local, window):
  """Rotary frequencies f32[h / 2] and window of a layer; `local` is traced."""
  freqs = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
  if c.local_rope_theta is not None:
    near = rope_frequencies(
      c.head_dim, c.local_rope_theta, c.local_rope_scaling
    )
    freqs = jnp.where(local, near, freqs)
  if window is not None and not all(c.local):
    oldest = jnp.where(local, window.oldest, _EVERYTHING)
    window = window._replace(oldest=oldest)
  return freqs, window
