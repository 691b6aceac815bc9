"""What a model is, and how it runs: the fields that families fill in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.attention import IMPLEMENTATIONS
from dpo_jax.models.layers import ACTIVATIONS
from dpo_jax.models.rope import RopeScaling

REMAT = ("none", "minimal", "block", "offload")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the model. Defaults other than sizes are Llama 2's; a family's
  own Config has other defaults and no other fields."""

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
  attention_bias: bool = False  # of q, k, v and o
  mlp_bias: bool = False
  qkv_bias: bool = False  # of q, k and v alone
  activation: str = "silu"
  qk_norm: bool = False  # each head's query and key, before the rotation
  # A local layer sees `window` tokens: itself and those just before.
  window: int | None = None
  local: tuple[bool, ...] = (False,)  # repeated until there is one per layer
  local_rope_theta: float | None = None  # of local layers; None: as the others
  local_rope_scaling: RopeScaling = RopeScaling()  # where theta is not None
  query_scalar: float | None = None  # scores / sqrt of it; None: head_dim
  attention_cap: float | None = None  # scores to cap * tanh(scores / cap)
  logit_cap: float | None = None  # logits likewise
  norm_plus_one: bool = False  # norms multiply by 1 + scale
  post_norms: bool = False  # norms also after attention and after the MLP
  scaled_embed: bool = False  # embeddings times sqrt(width)
  experts: int | None = None  # MLPs that tokens choose from; None: one for all
  experts_per_token: int = 2
  norm_topk: bool = True  # the chosen experts' weights add up to 1
  router_weight: float | None = 0.001  # of `moe.balance` in the loss
  scalar_head: bool = False  # a score, no logits: a reward model

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f"heads={self.heads} should be a multiple of kv_heads={self.kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} should be even")
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation={self.activation!r} should be one of {tuple(ACTIVATIONS)}"
      )
    local = tuple(self.local[i % len(self.local)] for i in range(self.layers))
    # Equal models are to have equal Configs, however these were written.
    object.__setattr__(self, "local", local)
    if self.query_scalar is None:
      object.__setattr__(self, "query_scalar", self.head_dim)
    if any(local) and self.window is None:
      raise ValueError("layers with a sliding window, and window=None")
    if self.experts is not None:
      if not 0 < self.experts_per_token <= self.experts:
        raise ValueError(
          f"experts_per_token={self.experts_per_token} of"
          f" experts={self.experts}"
        )
      if self.mlp_bias:
        raise ValueError("experts with mlp_bias are not supported")


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the model runs; changes speed and rounding, never its meaning."""

  dtype: Any = jnp.float32  # of activations
  param_dtype: Any = jnp.float32  # of the weights that are trained
  # For the backward keep all it reads ("none"), of that what products and
  # attention made ("minimal"), each layer's input only ("block"), or that in
  # the host's memory ("offload").
  remat: str = "minimal"
  attention: str = "auto"  # see `attention.attention`
  # Pins a layer's activations f[B T D] and its weights (a dict of arrays
  # without the layer axis, and the dtype they are used in) to the mesh; see
  # sharding.py.
  pin_activations: Callable[[jax.Array], jax.Array] = lambda x: x
  pin_weights: Callable[..., Any] = lambda w, dtype: w
  # True: weights that were pinned are not kept for the backward, but again.
  pin_again: bool = False
  # Copies embedding and unembedding for every device, and the look-up in such.
  copy_weights: Callable[..., jax.Array] | None = None
  place_lookup: Callable[[Any], Any] = lambda function: function
  unpack_weights: Callable[[Any], Any] = lambda w: w  # see quantize.py
  # Wraps attention, where it is a kernel, so that each device runs its own rows
  # and heads.
  place_attention: Callable[[Any], Any] = lambda function: function
  # Wraps the experts so that each device routes its own tokens.
  place_experts: Callable[[Any], Any] = lambda function: function

  def __post_init__(self):
    if self.remat not in REMAT:
      raise ValueError(f"remat={self.remat!r} should be one of {REMAT}")
    if self.attention not in IMPLEMENTATIONS:
      raise ValueError(
        f"attention={self.attention!r} should be one of {IMPLEMENTATIONS}"
      )
