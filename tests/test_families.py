"""Every family against logits that transformers computed, with each setting
that it has; and a window that cuts the prompt, in mirrored rows."""

import dataclasses
import json
import shutil

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from shared import SHARED, needs_shared

from dpo_jax import sharding
from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf
from dpo_jax.sample import make_sampler

GOLDEN = SHARED / "data" / "hf_golden"
NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
TOLERANCE = 1e-4


pytestmark = pytest.mark.usefixtures("compile_quickly")


def copy_of(name, to, style="config.json", **changes):
  """A golden folder in which config.json has other values; `...` drops a key,
  and a key with a slash is that of an entry's entry."""
  shutil.copytree(GOLDEN / name, to)
  for path in (to, *to.iterdir()):
    path.chmod(0o755)
  values = json.loads((to / style).read_text())
  for key, value in changes.items():
    *outer, key = key.split("/")
    place = values
    for part in outer:
      place = place[part]
    place[key] = value
    if value is ...:
      del place[key]
  (to / "config.json").write_text(json.dumps(values))
  return to


def load(folder):
  """(family module, model, variables)."""
  module, config = hf.read_config(folder)
  model = module.Model(config)
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  return module, model, hf.load_variables(folder, module.HF_NAMES, abstract)


def logits_of(model, variables, ids):
  """i32[B T] -> f32[B T V], all of it by hand but the model."""
  index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  hidden = model.apply(variables, ids, index, index * 0, index + 1)
  logits = hidden @ model.unembed(variables).T
  cap = model.logit_cap
  return logits if cap is None else jnp.tanh(logits / cap) * cap


def distances(folder, name):
  """Largest distance of logits, and of log-probs, to the golden ones."""
  golden = np.load(GOLDEN / name / "golden.npz")
  _, model, variables = load(folder)
  logits = logits_of(model, variables, jnp.asarray(golden["input_ids"]))
  there = golden["attention_mask"] == 1
  logps = jax.nn.log_softmax(logits[:, :-1])
  next_ids = golden["input_ids"][:, 1:, None]
  logps = np.asarray(jnp.take_along_axis(logps, next_ids, axis=-1))[..., 0]
  far = np.abs(np.asarray(logits) - golden["logits"])[there].max()
  return far, np.abs(logps - golden["token_logps"])[there[:, 1:]].max()


@needs_shared
@pytest.mark.parametrize("style", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_equal_those_of_transformers(name, style, tmp_path):
  logits, logps = distances(copy_of(name, tmp_path / "m", style), name)
  assert logits < TOLERANCE and logps < TOLERANCE


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_both_styles_of_config_say_the_same(name, tmp_path):
  new = hf.read_config(copy_of(name, tmp_path / "5"))
  old = hf.read_config(copy_of(name, tmp_path / "4", "config_v4.json"))
  assert new == old


def tensors(folder):
  found = {}
  for file in sorted(folder.glob("*.safetensors")):
    found |= safetensors.numpy.load_file(file)
  return found


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_byte_for_byte_what_was_read(name, tmp_path):
  module, model, variables = load(GOLDEN / name)
  hf.save_checkpoint(tmp_path / "out", module, model.config, variables)
  before, after = tensors(GOLDEN / name), tensors(tmp_path / "out")
  assert sorted(before) == sorted(after)
  for key, array in before.items():
    assert array.dtype == after[key].dtype, key
    assert array.shape == after[key].shape, key
    assert array.tobytes() == after[key].tobytes(), key
  assert hf.read_config(tmp_path / "out")[1] == model.config


LOST = {
  "mistral": [{"rope_parameters/rope_theta": 500_000.0},
              {"rms_norm_eps": 1e-2}, {"sliding_window": 8},
              {"num_attention_heads": 2, "head_dim": 16,
               "num_key_value_heads": 1}],
  "qwen2": [{"rope_parameters/rope_theta": 500_000.0}, {"rms_norm_eps": 1e-2},
            {"use_sliding_window": True, "sliding_window": 8,
             "max_window_layers": 1, "layer_types": ...}],
  "qwen3": [{"rope_parameters/rope_theta": 500_000.0}, {"rms_norm_eps": 1e-2},
            {"use_sliding_window": True, "sliding_window": 8,
             "layer_types": ["sliding_attention", "full_attention"]}],
  "gemma2": [{"rope_parameters/rope_theta": 500_000.0},
             {"rms_norm_eps": 1e-2}, {"sliding_window": 24},
             {"sliding_window": ...}, {"sliding_window": 7},
             {"layer_types": ["full_attention", "sliding_attention"]},
             {"attn_logit_softcapping": None},
             {"final_logit_softcapping": None},
             {"query_pre_attn_scalar": ...}],
  "gemma3": [{"rope_parameters/full_attention/rope_theta": 10_000.0},
             {"rope_parameters/sliding_attention/rope_theta": 1e6},
             {"rope_parameters/full_attention/factor": 2.0,
              "rope_parameters/full_attention/rope_type": "linear"},
             {"rope_parameters/sliding_attention/factor": 2.0,
              "rope_parameters/sliding_attention/rope_type": "linear"},
             {"rms_norm_eps": 1e-2}, {"sliding_window": ...},
             {"sliding_window": 9},
             {"layer_types": ...},  # then every sixth is global, and none here
             {"final_logit_softcapping": 2.0},
             {"query_pre_attn_scalar": ...}],
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize(
  ("name", "changes"),
  [(name, changes) for name in LOST for changes in LOST[name]],
  ids=str,
)
def test_a_setting_that_is_lost_shows_in_the_golden_logits(
  name, changes, tmp_path
):
  logits, _ = distances(copy_of(name, tmp_path / "m", **changes), name)
  assert logits > 10 * TOLERANCE


# Of Config, what a family has beyond Llama: without it, other numbers.
FEATURES = [
  ("qwen2", {"qkv_bias": False}),
  ("qwen3", {"qk_norm": False}),
  *[
    (name, change)
    for name in ("gemma2", "gemma3")
    for change in (
      {"norm_plus_one": False},
      {"post_norms": False},
      {"scaled_embed": False},
      {"activation": "silu"},
      {"local": (False,)},
      {"query_scalar": 8},
    )
  ],
  ("gemma3", {"qk_norm": False}),
  ("gemma3", {"local_rope_theta": None}),
]


@needs_shared
@pytest.mark.parametrize(("name", "change"), FEATURES, ids=str)
def test_a_feature_that_is_lost_shows_in_the_golden_logits(name, change):
  module, model, variables = load(GOLDEN / name)
  golden = np.load(GOLDEN / name / "golden.npz")
  without = module.Model(dataclasses.replace(model.config, **change))
  shapes = jax.eval_shape(without.init_variables, jax.random.key(0))
  flat = traverse.flatten_dict(variables)
  kept = {key: flat[key] for key in traverse.flatten_dict(shapes)}
  logits = logits_of(
    without, traverse.unflatten_dict(kept), jnp.asarray(golden["input_ids"])
  )
  there = golden["attention_mask"] == 1
  far = np.abs(np.asarray(logits) - golden["logits"])[there].max()
  assert far > 10 * TOLERANCE


@needs_shared
@pytest.mark.parametrize(
  ("name", "changes", "words"),
  [
    ("llama", {"architectures": ["LlamaForTokenClassification"]},
     "'LlamaForTokenClassification'"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]},
     "2 labels; a reward model has 1"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantised"),
    ("llama", {"rope_parameters/partial_rotary_factor": 0.5},
     "partial_rotary_factor=0.5"),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 2.0}}},
     "'full_attention'"),
    ("qwen2", {"rope_parameters/rope_type": "mrope"}, "'mrope'"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]},
     "'chunked_attention'"),
    ("qwen2", {"layer_types": ["full_attention"]}, "1 layer_types for 2"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]},
     "window=None"),
    ("qwen3", {"hidden_act": "relu"}, "'relu'; qwen3 has 'silu'"),
    ("qwen3", {"model_type": "qwen2_moe"}, "'qwen2_moe'"),
    ("mistral", {"sliding_window": 0}, "window=0"),
    ("mistral", {"sliding_window": "8"}, "window='8'"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"],
                 "sliding_window": 8}, "differ from layer to layer"),
    ("gemma2", {"hidden_activation": "gelu"}, "'gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "logit_cap=-1.0"),
    ("gemma2", {"attn_logit_softcapping": "50"}, "attention_cap='50'"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_scalar=0"),
    ("gemma2", {"sliding_window": None}, "window=None"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
    ("qwen2", {"num_attention_heads": 0}, "config.json"),
    ("gemma3", {"model_type": "gemma3"}, "known: llama, mistral"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "'rope_theta'"),
    ("gemma3", {"rope_parameters/full_attention/rope_type": "yarn"}, "'yarn'"),
  ],
  ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
  name, changes, words, tmp_path
):
  folder = copy_of(name, tmp_path / "m", **changes)
  with pytest.raises(CheckpointError) as error:
    hf.read_config(folder)
  assert words in str(error.value)
  assert "\n" not in str(error.value)


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_no_cache(name):
  _, model, variables = load(GOLDEN / name)
  rng = np.random.default_rng(4)
  prompts = [rng.integers(3, 256, n).tolist() for n in (1, 5, 21)]
  out = make_sampler(model, max_tokens=12, stop_ids=(-1,), temperature=0)(
    variables, prompts, 0
  )
  for prompt, tokens, logps in zip(prompts, out.tokens, out.logps):
    ids = jnp.asarray([prompt + tokens.tolist()])
    logits = logits_of(model, variables, ids)[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), tokens)
    best = jax.nn.log_softmax(logits).max(axis=-1)
    np.testing.assert_allclose(logps, best, atol=2e-5)


@pytest.mark.parametrize("name", hf.FAMILIES)
def test_a_family_from_scratch_is_saved_and_read_back(name, tmp_path):
  module = hf.family(name)
  config = module.Config(
    vocab_size=24, width=8, ffn=12, layers=7, heads=4, kv_heads=2, head_dim=2
  )
  variables = module.Model(config).init_variables(jax.random.key(1))
  hf.save_checkpoint(tmp_path / "m", module, config, variables)
  _, again, loaded = load(tmp_path / "m")
  assert again.config == config
  jax.tree.map(np.testing.assert_array_equal, variables, loaded)


@pytest.mark.parametrize("name", hf.FAMILIES)
def test_every_weight_has_a_name_and_a_place_on_the_mesh(name):
  module = hf.family(name)
  biases = "layers/attention/o/bias" in module.HF_NAMES
  config = module.Config(
    8, 8, 8, 2, 2, 2, 4, tied=False, attention_bias=biases,
    mlp_bias="layers/mlp/up/bias" in module.HF_NAMES,
  )  # fmt: skip
  model = module.Model(config)
  params = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
  leaves = traverse.flatten_dict(params, sep="/")
  assert sorted(leaves) == sorted(module.HF_NAMES.keys() - {"score"})
  mesh = sharding.make_mesh()
  for path, leaf in leaves.items():
    spec = sharding.spec_for(path, leaf.shape, mesh)
    if path.endswith("scale"):
      assert not any(spec), path
    elif path.endswith("kernel"):
      assert any(spec), path
