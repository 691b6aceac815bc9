"""The Llama family: Llama 2 and 3, and what is shaped like them.

Layers are stacked along a leading axis of every weight and run by one scan, so
the program has one layer's size whatever the depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.attention import IMPLEMENTATIONS
from dpo_jax.models.layers import GatedMLP, RMSNorm, SelfAttention
from dpo_jax.models.rope import (
  RopeScaling,
  rope_frequencies,
  rope_from_hf,
  rope_scaling_to_hf,
)

Cache = tuple[jax.Array, jax.Array]
REMAT = ("none", "block")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the model. Defaults other than sizes are Llama 2's."""

  vocab_size: int
  width: int
  ffn: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  max_length: int = 2048
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  norm_epsilon: float = 1e-5
  tied: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f"heads={self.heads} should be a multiple of kv_heads={self.kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} should be even")


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the model runs; changes speed and rounding, never its meaning."""

  dtype: Any = jnp.float32  # of activations
  param_dtype: Any = jnp.float32  # of the weights that are trained
  remat: str = "none"  # "block": keep only each block's input for the backward
  attention: str = "blockwise"
  # Pins a layer's activations f[B T D] and its weights (a dict of arrays
  # without the layer axis) to the mesh; see sharding.py.
  pin_activations: Callable[[jax.Array], jax.Array] = lambda x: x
  pin_weights: Callable[[Any], Any] = lambda w: w

  def __post_init__(self):
    if self.remat not in REMAT:
      raise ValueError(f"remat={self.remat!r} should be one of {REMAT}")
    if self.attention not in IMPLEMENTATIONS:
      raise ValueError(
        f"attention={self.attention!r} should be one of {IMPLEMENTATIONS}"
      )


class Block(nn.Module):
  """Pre-norm attention and MLP, each added to the residual stream."""

  config: Config
  compute: Compute

  @nn.compact
  def __call__(self, x, positions, key_start, key_end, cache, cache_index):
    c, dtype = self.config, self.compute.param_dtype
    freqs = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    y = RMSNorm(c.norm_epsilon, dtype, name="attention_norm")(x)
    y, cache = SelfAttention(
      c.width, c.heads, c.kv_heads, c.head_dim, tuple(freqs.tolist()),
      c.attention_bias, self.compute.attention, dtype, name="attention",
    )(y, positions, key_start, key_end, cache, cache_index)  # fmt: skip
    x = x + y
    y = RMSNorm(c.norm_epsilon, dtype, name="mlp_norm")(x)
    x = x + GatedMLP(c.width, c.ffn, c.mlp_bias, dtype, name="mlp")(y)
    return x, cache


class Llama(nn.Module):
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
  ) -> jax.Array | tuple[jax.Array, Cache]:
    """Runs the decoder.

    Args:
      tokens: i32[B T].
      positions: i32[B T], rotary positions.
      key_start: i32[B T], first key each token sees (row index, or cache
        index when there is a cache).
      key_end: i32[B T], one past the last.
      cache: f[L B U K h] keys and values of earlier tokens; None to train.
      cache_index: where in the cache these tokens go.

    Returns:
      f[B T D], normalised; with a cache also the cache, these tokens added.
    """
    c, compute = self.config, self.compute
    embed = self.param(
      "embed",
      nn.initializers.normal(0.02),
      (c.vocab_size, c.width),
      compute.param_dtype,
    )
    block = Block(c, compute, parent=None)
    layers = self.param("layers", functools.partial(_init_layers, block))
    if not c.tied:
      self.param(
        "unembed",
        nn.initializers.normal(0.02),
        (c.vocab_size, c.width),
        compute.param_dtype,
      )
    pin = compute.pin_activations
    table = compute.pin_weights({"embed": embed})["embed"]
    x = pin(table[tokens].astype(compute.dtype))

    def one_layer(x, layer):
      weights, cache = layer
      x, cache = block.apply(
        {"params": compute.pin_weights(weights)},
        x, positions, key_start, key_end, cache, cache_index,
      )  # fmt: skip
      return pin(x), cache

    if compute.remat == "block":
      one_layer = jax.checkpoint(one_layer)
    x, new_cache = jax.lax.scan(one_layer, x, (layers, cache))
    norm = RMSNorm(c.norm_epsilon, compute.param_dtype, name="norm")
    return norm(x) if cache is None else (norm(x), new_cache)

  @nn.nowrap
  def unembed(self, variables: Any) -> jax.Array:
    """The output embedding, f[V D] in the compute dtype."""
    params = variables["params"]
    head = params["embed" if self.config.tied else "unembed"]
    return head.astype(self.compute.dtype)

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


def _init_layers(block: Block, rng: jax.Array) -> Any:
  x = jnp.zeros((1, 1, block.config.width), block.compute.dtype)
  one = jnp.zeros((1, 1), jnp.int32)

  def init(rng):
    return block.init(rng, x, one, one, one + 1, None, 0)["params"]

  return jax.vmap(init)(jax.random.split(rng, block.config.layers))


# Where each weight lives in a Hugging Face checkpoint. Kernels are stored there
# as [out, in] matrices; hf.py does the turning.
HF_NAMES = {
  "embed": "model.embed_tokens.weight",
  "unembed": "lm_head.weight",
  "norm/scale": "model.norm.weight",
  "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  **{
    f"layers/attention/{x}/{ours}": f"model.layers.{{}}.self_attn.{x}_proj.{hf}"
    for x in "qkvo"
    for ours, hf in (("kernel", "weight"), ("bias", "bias"))
  },
  **{
    f"layers/mlp/{x}/{ours}": f"model.layers.{{}}.mlp.{x}_proj.{hf}"
    for x in ("gate", "up", "down")
    for ours, hf in (("kernel", "weight"), ("bias", "bias"))
  },
}


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Llama `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: an activation or rope type this family does not have.
  """
  if hf.get("hidden_act", "silu") != "silu":
    raise ValueError(f"hidden_act {hf['hidden_act']!r}; llama has 'silu'")
  theta, scaling = rope_from_hf(hf)
  heads = hf["num_attention_heads"]
  return Config(
    vocab_size=hf["vocab_size"],
    width=hf["hidden_size"],
    ffn=hf["intermediate_size"],
    layers=hf["num_hidden_layers"],
    heads=heads,
    kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
    max_length=hf.get("max_position_embeddings", 2048),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_epsilon=hf.get("rms_norm_eps", 1e-6),
    tied=hf.get("tie_word_embeddings", False),
    attention_bias=hf.get("attention_bias", False),
    mlp_bias=hf.get("mlp_bias", False),
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.ffn,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_epsilon,
    "rope_theta": config.rope_theta,
    "rope_scaling": rope_scaling_to_hf(config.rope_scaling),
    "tie_word_embeddings": config.tied,
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
  }


Model = Llama  # the name that every family module has
