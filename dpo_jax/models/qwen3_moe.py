"""Qwen 3 with a mixture of experts in every layer."""

import dataclasses
from typing import Any

from dpo_jax.models import hf_config, qwen3
from dpo_jax.models.decoder import Compute, Decoder

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder
HF_NAMES = hf_config.names(
  norms=hf_config.PRE_NORMS | hf_config.QK_NORMS,
  biases="qkvo",
  experts=hf_config.ExpertNames("mlp", "gate_proj", "up_proj", "down_proj"),
)
_ARCHITECTURE = "Qwen3MoeForCausalLM"
_DEFAULTS = {
  "num_key_value_heads": 4,
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
  "moe_intermediate_size": 768,
  "num_experts_per_tok": 8,
  "norm_topk_prob": False,
}


@dataclasses.dataclass(frozen=True)
class Config(qwen3.Config):
  """Shape of a Qwen 3 mixture of experts; `ffn` is that of one expert."""

  experts: int | None = 128
  experts_per_token: int = 8
  norm_topk: bool = False


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Qwen 3 MoE `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, _DEFAULTS)
  if hf["decoder_sparse_step"] != 1:
    raise ValueError(
      f"decoder_sparse_step={hf['decoder_sparse_step']!r}; only 1, experts in"
      " every layer, is supported"
    )
  if hf["mlp_only_layers"]:
    raise ValueError(
      f"mlp_only_layers={hf['mlp_only_layers']!r}: layers without experts are"
      " not supported"
    )
  return Config(
    **hf_config.shared_fields(
      hf | {"intermediate_size": hf["moe_intermediate_size"]},
      activation="silu",
    ),
    **hf_config.rope_fields(hf),
    **hf_config.one_window(hf, _window(hf)),
    **hf_config.expert_fields(hf, Config.experts),
    attention_bias=hf["attention_bias"],
    norm_topk=hf["norm_topk_prob"],
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  return hf_config.write(config, "qwen3_moe", _ARCHITECTURE) | {
    "attention_bias": config.attention_bias,
    "use_sliding_window": config.window is not None,
    "sliding_window": config.window,
    "max_window_layers": 0 if config.window else config.layers,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": config.ffn,
    "num_experts": config.experts,
    "num_experts_per_tok": config.experts_per_token,
    "router_aux_loss_coef": config.router_weight or 0.0,
    "norm_topk_prob": config.norm_topk,
  }


def _window(hf: dict[str, Any]) -> int | None:
  if not hf["use_sliding_window"]:
    return None
  if hf.get("max_window_layers"):
    # Versions of transformers differ in whether it counts.
    raise ValueError("a sliding window with max_window_layers is not supported")
  return hf["sliding_window"]
