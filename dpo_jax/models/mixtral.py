"""Mixtral: Mistral with a mixture of experts in every layer."""

import dataclasses
from typing import Any

from dpo_jax.models import decoder, hf_config
from dpo_jax.models.decoder import Compute, Decoder

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder
HF_NAMES = hf_config.names(
  norms=hf_config.PRE_NORMS,
  experts=hf_config.ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
)
_ARCHITECTURE = "MixtralForCausalLM"
_DEFAULTS = {
  "num_key_value_heads": 8,
  "max_position_embeddings": 4096 * 32,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1_000_000.0,
  "tie_word_embeddings": False,
  "sliding_window": None,
  "num_experts_per_tok": 2,
  "router_jitter_noise": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
  """Shape of a Mixtral model; `ffn` is that of one expert."""

  rope_theta: float = 1_000_000.0
  experts: int | None = 8


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Mixtral `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, _DEFAULTS)
  if hf["router_jitter_noise"]:
    raise ValueError(
      f"router_jitter_noise={hf['router_jitter_noise']!r} is not supported"
    )
  return Config(
    **hf_config.shared_fields(hf, activation="silu"),
    **hf_config.rope_fields(hf),
    **hf_config.one_window(hf, hf["sliding_window"]),
    **hf_config.expert_fields(hf, Config.experts),
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  return hf_config.write(config, "mixtral", _ARCHITECTURE) | {
    "sliding_window": config.window,
    "num_local_experts": config.experts,
    "num_experts_per_tok": config.experts_per_token,
    "router_aux_loss_coef": config.router_weight or 0.0,
  }
