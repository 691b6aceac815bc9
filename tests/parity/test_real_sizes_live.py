"""Models at the sizes that are in use: names and shapes of every tensor, as
transformers has them for the same config. Nothing is allocated."""

import json

import flax.traverse_util as traverse
import jax
import pytest

from dpo_jax.models import hf, layout

from .live import WHY

torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

pytestmark = pytest.mark.parity

# The defaults of each class are a real model, or these make one of it.
MODELS = {
  "llama-7b": ("llama", {}),
  "llama3-8b": (
    "llama",
    {
      "vocab_size": 128_256, "intermediate_size": 14_336,
      "num_key_value_heads": 8, "rope_theta": 500_000.0,
      "max_position_embeddings": 131_072,
      "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
      },
    },
  ),
  "mistral-7b": ("mistral", {}),
  "mixtral-8x7b": ("mixtral", {}),
  "qwen2-7b": (
    "qwen2",
    {
      "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
      "num_hidden_layers": 28, "num_attention_heads": 28,
      "num_key_value_heads": 4,
    },
  ),
  "qwen3-0.6b": (
    "qwen3",
    {
      "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
      "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
      "tie_word_embeddings": True,
    },
  ),
  "qwen3-30b-a3b": (
    "qwen3_moe",
    {"num_hidden_layers": 48, "norm_topk_prob": True, "head_dim": 128},
  ),
  "gemma2-2b": ("gemma2", {}),
  "gemma2-27b": (
    "gemma2",
    {
      "hidden_size": 4608, "intermediate_size": 36_864, "head_dim": 128,
      "num_hidden_layers": 46, "num_attention_heads": 32,
      "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
    },
  ),
  "gemma3-1b": (
    "gemma3_text",
    {
      "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912,
      "num_hidden_layers": 26, "num_attention_heads": 4,
      "num_key_value_heads": 1,
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_the_name_and_shape_of_theirs(name, tmp_path):
  family, changes = MODELS[name]
  config = transformers.AutoConfig.for_model(family, **changes)
  config.save_pretrained(tmp_path)
  module, ours = hf.read_config(tmp_path)
  model = module.Model(ours)
  params = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
  found = {}
  for path, leaf in traverse.flatten_dict(params, sep="/").items():
    theirs = module.HF_NAMES[path]
    part = leaf.shape[layout.stacked_axes(theirs) :]
    for index in layout.indices(theirs, leaf.shape):
      found[theirs.format(*index)] = layout.hf_shape(path, part)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
  expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  if config.tie_word_embeddings:
    expected.pop("lm_head.weight", None)
  if ours.experts is None:
    assert found == expected
  else:  # in memory theirs are fused, and on disk one a file entry
    size = lambda shapes: sum(torch.Size(x).numel() for x in shapes.values())
    rest = {k: v for k, v in expected.items() if "experts" not in k}
    named = {k: v for k, v in found.items() if "experts" not in k}
    assert len(rest) == len(named) and size(rest) == size(named)
    assert size(found) == size(expected)
  # What we would write for it is read by both as the same model.
  (tmp_path / "again").mkdir()
  about = json.dumps(module.config_to_hf(ours))
  (tmp_path / "again" / "config.json").write_text(about)
  assert hf.read_config(tmp_path / "again")[1] == ours
