"""Gemma 2: every other layer local, soft caps, norms on both sides of a block.

Gemma 3 shares its activation, norms and query scale.
"""

import dataclasses
from typing import Any

from dpo_jax.models import decoder, hf_config
from dpo_jax.models.decoder import Compute, Decoder

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder
NORMS = {
  "attention_norm": "input_layernorm",
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
HF_NAMES = hf_config.names(norms=NORMS, biases="qkvo")
ACTIVATION, ACT_FIELD = "gelu_pytorch_tanh", "hidden_activation"
_ARCHITECTURE = "Gemma2ForCausalLM"
DEFAULTS = {
  "num_key_value_heads": 4,
  "head_dim": 256,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
_DEFAULTS = DEFAULTS | {
  "max_position_embeddings": 8192,
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
}


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
  """Shape of a Gemma 2 model."""

  norm_epsilon: float = 1e-6
  tied: bool = True
  activation: str = ACTIVATION
  window: int | None = 4096
  local: tuple[bool, ...] = (True, False)
  attention_cap: float | None = 50.0
  logit_cap: float | None = 30.0
  norm_plus_one: bool = True
  post_norms: bool = True
  scaled_embed: bool = True


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Gemma 2 `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, _DEFAULTS)
  turns = [i % 2 == 0 for i in range(hf["num_hidden_layers"])]
  return Config(
    **shared_fields(hf),
    **hf_config.rope_fields(hf),
    local=hf_config.local_layers(hf, turns),
    attention_cap=hf["attn_logit_softcapping"],
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  written = write(config, "gemma2", _ARCHITECTURE)
  return written | {"attn_logit_softcapping": config.attention_cap}


def shared_fields(hf: dict[str, Any]) -> dict[str, Any]:
  """Fields of Config that Gemma 2 and 3 have, rotary ones aside."""
  return {
    **hf_config.shared_fields(hf, activation=ACTIVATION, act_field=ACT_FIELD),
    "attention_bias": hf["attention_bias"],
    "window": hf["sliding_window"],
    "query_scalar": hf["query_pre_attn_scalar"],
    "logit_cap": hf["final_logit_softcapping"],
  }


def write(
  config: decoder.Config, model_type: str, architecture: str
) -> dict[str, Any]:
  """The entries that `shared_fields` and `local_layers` read back."""
  return hf_config.write(config, model_type, architecture, ACT_FIELD) | {
    "attention_bias": config.attention_bias,
    "sliding_window": config.window,
    "layer_types": hf_config.write_layer_types(config),
    "query_pre_attn_scalar": config.query_scalar,
    "final_logit_softcapping": config.logit_cap,
  }
