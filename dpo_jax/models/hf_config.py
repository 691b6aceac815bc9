"""What the families share in reading and writing `config.json` and names.

Fields that are absent mean what they mean to transformers: the default of its
config class. What would change a number and is not supported is refused.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_jax.models.decoder import Config
from dpo_jax.models.rope import rope_from_hf, rope_scaling_to_hf

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_SCORING = "ForSequenceClassification"


class ExpertNames(NamedTuple):
  """What a family calls its experts in a checkpoint."""

  mlp: str
  gate: str
  up: str
  down: str


def names(
  *,
  norms: dict[str, str],
  biases: str = "",
  experts: ExpertNames | None = None,
) -> dict[str, str]:
  """Where each weight lives in a Hugging Face checkpoint.

  Kernels are stored there as [out, in] matrices; layout.py does the turning.

  Args:
    norms: our names of the layer's norms over the width to theirs.
    biases: projections that can have one, of "qkvo" and "gud" (the MLP's).
    experts: instead of one MLP a layer.
  """
  layer = "model.layers.{}."
  mlp = () if experts else ("gate", "up", "down")
  found = {
    "embed": "model.embed_tokens.weight",
    "unembed": "lm_head.weight",
    "score": "score.weight",
    "norm/scale": "model.norm.weight",
  }
  for ours, theirs in norms.items():
    found[f"layers/{ours}/scale"] = f"{layer}{theirs}.weight"
  for part, theirs, xs in (
    ("attention", "self_attn", "qkvo"),
    ("mlp", "mlp", mlp),
  ):
    for x in xs:
      to = f"{layer}{theirs}.{x}_proj"
      found[f"layers/{part}/{x}/kernel"] = f"{to}.weight"
      if x[0] in biases:
        found[f"layers/{part}/{x}/bias"] = f"{to}.bias"
  if experts:
    to = f"{layer}{experts.mlp}."
    found["layers/mlp/router/kernel"] = f"{to}gate.weight"
    for x in ("gate", "up", "down"):
      found[f"layers/mlp/experts/{x}/kernel"] = (
        f"{to}experts.{{}}.{getattr(experts, x)}.weight"
      )
  return found


PRE_NORMS = {
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
}
QK_NORMS = {
  "attention/q_norm": "self_attn.q_norm",
  "attention/k_norm": "self_attn.k_norm",
}


def read(
  hf: dict[str, Any], architecture: str, defaults: dict[str, Any]
) -> dict[str, Any]:
  """The config with the defaults of its class, after what no family has.

  Raises:
    KeyError: no number of layers.
    ValueError: another architecture of this family, or quantised weights.
  """
  known = architecture, _scoring(architecture)
  for found in hf.get("architectures") or [architecture]:
    if found not in known:
      raise ValueError(
        f"architecture {found!r} is not supported; known: {', '.join(known)}"
      )
  if hf.get("quantization_config"):
    raise ValueError("quantization_config: quantised weights are not supported")
  hf = defaults | hf
  layers = hf["num_hidden_layers"]
  if type(layers) is not int or layers < 1:  # families count with it
    raise ValueError(f"layers={layers!r} should be a size")
  if hf.get("use_bidirectional_attention"):
    raise ValueError("use_bidirectional_attention is not supported")
  return hf


def _scoring(architecture: str) -> str:
  """What transformers calls the model with a scalar head."""
  named = {"Gemma3ForCausalLM": "Gemma3TextForCausalLM"}
  architecture = named.get(architecture, architecture)
  return architecture.replace("ForCausalLM", _SCORING)


def _has_scalar_head(hf: dict[str, Any]) -> bool:
  """Whether a folder is of a reward model.

  Raises:
    ValueError: it is of a classifier.
  """
  if not any(x.endswith(_SCORING) for x in hf.get("architectures") or ()):
    return False
  labels = hf.get("id2label")
  # transformers has no entry for two, and a number where nothing is named.
  count = hf.get("num_labels", 2) if labels is None else len(labels)
  if count != 1:
    raise ValueError(f"{count!r} labels; a reward model has 1")
  return True


def shared_fields(
  hf: dict[str, Any], *, activation: str, act_field: str = "hidden_act"
) -> dict[str, Any]:
  """Fields of Config that every family has, rotary ones aside.

  Raises:
    KeyError: a size is missing.
    ValueError: an activation that this family does not have.
  """
  found = hf.get(act_field, activation)
  if found != activation:
    model = hf.get("model_type")
    raise ValueError(f"{act_field} {found!r}; {model} has {activation!r}")
  heads = hf["num_attention_heads"]
  return {
    "vocab_size": hf["vocab_size"],
    "width": hf["hidden_size"],
    "ffn": hf["intermediate_size"],
    "layers": hf["num_hidden_layers"],
    "heads": heads,
    "kv_heads": hf.get("num_key_value_heads") or heads,
    "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
    "max_length": hf["max_position_embeddings"],
    "norm_epsilon": hf["rms_norm_eps"],
    "tied": hf["tie_word_embeddings"],
    "activation": activation,
    "scalar_head": _has_scalar_head(hf),
  }


def rope_fields(hf: dict[str, Any]) -> dict[str, Any]:
  """Rotary fields of Config, where all layers have the same."""
  theta, scaling = rope_from_hf(hf)
  return {"rope_theta": theta, "rope_scaling": scaling}


def local_layers(
  hf: dict[str, Any], otherwise: Sequence[bool]
) -> tuple[bool, ...]:
  """Which layers have a sliding window: `layer_types`, or what the family does
  without.

  Raises:
    ValueError: a layer type that is not known here, or not one per layer.
  """
  kinds = hf.get("layer_types")
  if kinds is None:
    return tuple(otherwise)
  for kind in kinds:
    if kind not in (LOCAL, GLOBAL):
      raise ValueError(
        f"layer type {kind!r} is not supported; known: {GLOBAL}, {LOCAL}"
      )
  if len(kinds) != hf["num_hidden_layers"]:
    raise ValueError(
      f"{len(kinds)} layer_types for {hf['num_hidden_layers']} layers"
    )
  return tuple(kind == LOCAL for kind in kinds)


def one_window(hf: dict[str, Any], window: int | None) -> dict[str, Any]:
  """`window` and `local` of Config, where all layers are alike.

  Raises:
    ValueError: `layer_types` that say otherwise.
  """
  everywhere = (window is not None,) * hf["num_hidden_layers"]
  if local_layers(hf, everywhere) != everywhere:
    # transformers warns or reads nothing of it, and all layers are alike.
    raise ValueError("layer_types that differ from layer to layer")
  return {"window": window, "local": everywhere}


def expert_fields(hf: dict[str, Any], otherwise: int) -> dict[str, Any]:
  """Fields of Config about experts, of a file that has `num_experts_per_tok`.

  The number of experts has one name in transformers 4 and two in 5.

  Raises:
    ValueError: two numbers of experts, or one that is none.
  """
  names = "num_experts", "num_local_experts"
  count, *others = [hf[name] for name in names if name in hf] or [otherwise]
  if others and others[0] != count:
    raise ValueError(f"{names[0]}={count!r} and {names[1]}={others[0]!r}")
  if type(count) is not int or count < 1:
    raise ValueError(f"experts={count!r} should be a size")
  return {
    "experts": count,
    "experts_per_token": hf["num_experts_per_tok"],
    "router_weight": hf.get("router_aux_loss_coef", 0.001) or None,
  }


def write(
  config: Config,
  model_type: str,
  architecture: str,
  act_field: str = "hidden_act",
) -> dict[str, Any]:
  """The entries of `config.json` that every family has, in the style that
  transformers 4 and 5 both read."""
  head = {"architectures": [architecture]}
  if config.scalar_head:
    head = {
      "architectures": [_scoring(architecture)],
      "id2label": {"0": "LABEL_0"},  # one, and a label's name is not read
      "label2id": {"LABEL_0": 0},
    }
  return head | {
    "model_type": model_type,
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.ffn,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    act_field: config.activation,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_epsilon,
    "rope_theta": config.rope_theta,
    "rope_scaling": rope_scaling_to_hf(config.rope_scaling),
    "tie_word_embeddings": config.tied,
  }


def write_layer_types(config: Config) -> list[str]:
  """The `layer_types` that `local_layers` reads back."""
  return [LOCAL if local else GLOBAL for local in config.local]
