"""Checkpoints in and out, against logits that transformers computed."""

import dataclasses
import gzip
import json
import math
import pathlib
import shutil

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from hf_cases import (
  abstract,
  copy_of,
  load,
  random_folder,
  refused,
  same_bytes,
  tensors,
)
from shared import SHARED, needs_shared

from dpo_jax import losses
from dpo_jax.build import build
from dpo_jax.config import Config, Model
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import load_examples
from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf, llama, rope
from dpo_jax.train_step import evaluate_step, train_step
from dpo_jax.update import TrainState
from dpo_jax.weights import load_variables

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLAMA = SHARED / "data" / "hf_golden" / "llama"
STORIES = SHARED / "data" / "stories260k" / "hf"
# Of golden logits. Ours are 2e-6 away; a lost norm epsilon moves them by 7e-5.
TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def folder(tmp_path):
  random_folder(tmp_path / "m")
  return tmp_path / "m"


def golden_logits(config, variables):
  golden = np.load(LLAMA / "golden.npz")
  ids = jnp.asarray(golden["input_ids"])
  index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  model = llama.Model(config)
  hidden = model.apply(variables, ids, index, index * 0, index + 1)
  return golden, hidden @ model.unembed(variables).T


def furthest(config, variables):
  """Largest distance to the golden logits, where there is no padding."""
  golden, logits = golden_logits(config, variables)
  there = golden["attention_mask"] == 1
  return np.abs(np.asarray(logits) - golden["logits"])[there].max()


@needs_shared
@pytest.mark.parametrize("style", ["config.json", "config_v4.json"])
def test_logits_and_token_log_probs_equal_those_of_transformers(
  style, tmp_path
):
  folder = copy_of(LLAMA, tmp_path / "m")
  shutil.copy(LLAMA / style, folder / "config.json")
  golden, logits = golden_logits(*load(folder))
  there = golden["attention_mask"] == 1
  np.testing.assert_allclose(
    np.asarray(logits)[there], golden["logits"][there], atol=TOLERANCE
  )
  logps = jax.nn.log_softmax(logits[:, :-1])
  next_ids = golden["input_ids"][:, 1:, None]
  logps = np.asarray(jnp.take_along_axis(logps, next_ids, axis=-1))[..., 0]
  np.testing.assert_allclose(
    logps[there[:, 1:]], golden["token_logps"][there[:, 1:]], atol=1e-4
  )
  completion = golden["completion_mask"].astype(bool)
  mine = completion[:, 1:] if completion.shape == there.shape else completion
  sums = np.where(mine, logps, 0).astype(np.float64).sum(axis=1)
  np.testing.assert_allclose(sums, golden["completion_logps"], atol=1e-4)


@needs_shared
@pytest.mark.parametrize(
  "changes",
  [
    {"rms_norm_eps": ...},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
  ],
  ids=["no epsilon", "another base", "scaled positions"],
)
def test_a_setting_that_is_lost_shows_in_the_golden_logits(changes, tmp_path):
  folder = copy_of(LLAMA, tmp_path / "m", **changes)
  assert furthest(*load(folder)) > 5 * TOLERANCE


@needs_shared
def test_head_grouping_that_is_lost_does_not_load(tmp_path):
  folder = copy_of(LLAMA, tmp_path / "m", num_key_value_heads=...)
  with pytest.raises(CheckpointError, match=r"\[16, 32\].*\[32, 32\]"):
    load(folder)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
  """The trained model, its 0.9 reference, and the first 8 tone pairs."""
  golden = json.loads((STORIES.parent / "golden.json").read_text())
  source = tmp_path_factory.mktemp("stories") / "pairs.jsonl"
  with gzip.open(SHARED / "data/tone_pairs/pairs.jsonl.gz", "rt") as f:
    source.write_text("".join(line for line, _ in zip(f, golden["pairs"])))
  config = Config(model=Model(path=str(STORIES)))
  built = build(config)
  settings = EncodeSettings(max_length=512, max_prompt_length=384)
  examples = load_examples(str(source), "train", built.tokenizer, settings)
  policy = load_variables(config, built)
  reference = jax.tree.map(lambda x: x, policy)
  reference["params"]["norm"]["scale"] *= 0.9
  return golden, built, examples, policy, reference


@needs_shared
def test_real_pairs_score_as_transformers_scored_them(stories):
  golden, built, examples, policy, reference = stories
  pairs = golden["pairs"]
  for i, pair in enumerate(pairs):
    assert examples.prompt(i).tolist() == pair["prompt_ids"]
    assert examples.chosen(i).tolist() == pair["chosen_ids"]
    assert examples.rejected(i).tolist() == pair["rejected_ids"]
  plan = Plan(examples, batch_size=len(pairs), shuffle=False)
  batch, ids = plan[0]
  step = jax.jit(evaluate_step, static_argnames=("score", "loss"))
  loss = losses.make("dpo", beta=0.1)
  sums, *scored = step(policy, reference, batch, score=built.score, loss=loss)
  for name, scores in zip(("policy", "ref"), scored):
    by_example = np.zeros((len(pairs), 2))
    by_example[ids[ids >= 0]] = np.asarray(scores.logps)[ids >= 0]
    wanted = [
      [p[f"{name}_chosen_logps"], p[f"{name}_rejected_logps"]] for p in pairs
    ]
    # Sums near 250, whose float32 spacing is 1.5e-5.
    np.testing.assert_allclose(by_example, wanted, atol=1e-4, rtol=0)
  wanted = golden["dpo_loss_beta_0.1"]
  assert float(sums["loss"].mean()) == pytest.approx(wanted, abs=1e-5)
  accuracy = float(sums["rewards/accuracies"].mean())
  assert accuracy == golden["reward_accuracy"]


@needs_shared
def test_the_training_step_reports_the_same_golden_loss(stories):
  golden, built, examples, policy, reference = stories
  batch, _ = Plan(examples, batch_size=8, seed=5)[0]  # shuffled: same mean
  tx = optax.sgd(1e-3)
  state = TrainState(jnp.int32(0), policy, tx.init(policy), jnp.int32(0))
  step = jax.jit(train_step, static_argnames=("score", "loss", "tx"))
  new, sums = step(
    state, reference, batch, score=built.score, loss=losses.make("dpo"), tx=tx
  )
  wanted = golden["dpo_loss_beta_0.1"]
  assert float(sums["loss"].mean()) == pytest.approx(wanted, abs=1e-5)
  assert int(new.step) == 1 and int(new.skipped) == 0


@needs_shared
@pytest.mark.parametrize("folder", [LLAMA, STORIES], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 30_000])
def test_what_is_written_is_byte_for_byte_what_was_read(
  folder, shard_bytes, tmp_path
):
  config, variables = load(folder)
  out = tmp_path / "out"
  hf.save_checkpoint(out, llama, config, variables, max_shard_bytes=shard_bytes)
  same_bytes(tensors(folder), tensors(out))
  assert hf.read_config(out)[1] == config
  files = sorted(out.glob("*.safetensors"))
  if shard_bytes > 2**20:
    assert [f.name for f in files] == ["model.safetensors"]
    return
  assert len(files) > 2
  index = json.loads((out / "model.safetensors.index.json").read_text())
  for file in files:
    with safetensors.safe_open(file, framework="numpy") as opened:
      names = set(opened.keys())
      assert opened.metadata() == {"format": "pt"}  # transformers asks for it
    assert names == {
      k for k, v in index["weight_map"].items() if v == file.name
    }
  total = sum(t.nbytes for t in tensors(folder).values())
  assert index["metadata"]["total_size"] == total
  _, again = load(out)
  jax.tree.map(np.testing.assert_array_equal, variables, again)


@needs_shared
def test_bfloat16_weights_are_rounded_once_and_then_kept(tmp_path):
  config, variables = load(LLAMA, param_dtype=jnp.bfloat16)
  out = tmp_path / "out"
  hf.save_checkpoint(out, llama, config, variables)
  rounded = {k: v.astype(jnp.bfloat16) for k, v in tensors(LLAMA).items()}
  same_bytes(rounded, tensors(out))
  written = json.loads((out / "config.json").read_text())
  assert written["torch_dtype"] == "bfloat16"
  _, again = load(out, param_dtype=jnp.bfloat16)
  jax.tree.map(np.testing.assert_array_equal, variables, again)


def test_biases_and_every_setting_survive_a_round_trip(tmp_path):
  scaling = rope.RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)
  config, variables = random_folder(
    tmp_path / "m",
    max_length=77,
    rope_theta=500_000.0,
    rope_scaling=scaling,
    norm_epsilon=3e-6,
    head_dim=6,  # not width / heads
    attention_bias=True,
    mlp_bias=True,
  )
  again, loaded = load(tmp_path / "m")
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, variables, loaded)
  shapes = {k: v.shape for k, v in tensors(tmp_path / "m").items()}
  layer = "model.layers.2."
  assert shapes[layer + "self_attn.q_proj.weight"] == (24, 8)
  assert shapes[layer + "self_attn.k_proj.bias"] == (12,)
  assert shapes[layer + "self_attn.o_proj.weight"] == (8, 24)
  assert shapes[layer + "mlp.down_proj.weight"] == (8, 12)
  # Each layer has its own weights, in its own place.
  q = tensors(tmp_path / "m")["model.layers.1.self_attn.q_proj.weight"]
  ours = variables["params"]["layers"]["attention"]["q"]["kernel"][1]
  np.testing.assert_array_equal(q, np.asarray(ours).reshape(8, 24).T)


def test_a_missing_folder_is_refused(tmp_path):
  refused(tmp_path / "none", "config.json", "Hugging Face checkpoint folder")


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"model_type": "mamba"}, ["'mamba'", "known: llama"]),
    ({"model_type": ...}, ["known: llama"]),
    ({"model_type": ["llama"]}, []),
    ({"hidden_act": "gelu"}, ["'gelu'", "'silu'"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["'yarn'"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
    ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
    ({"rope_scaling": {"type": "linear"}}, ["'factor'"]),
    ({"rope_scaling": "linear"}, []),
    ({"vocab_size": ...}, ["vocab_size"]),
    ({"vocab_size": "24"}, ["vocab_size", "'24'"]),
    ({"hidden_size": 0}, ["width"]),
    ({"num_hidden_layers": -1}, ["layers"]),
    ({"num_attention_heads": 0}, ["heads"]),
    ({"num_key_value_heads": 3}, ["kv_heads=3"]),
    ({"num_hidden_layers": 3.0}, ["layers=3.0"]),
    ({"rms_norm_eps": math.inf}, ["norm_epsilon=inf"]),
    ({"rms_norm_eps": "small"}, ["norm_epsilon"]),
    ({"tie_word_embeddings": "no"}, ["tied"]),
  ],
  ids=str,
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, words):
  file = folder / "config.json"
  values = json.loads(file.read_text()) | changes
  values = {k: v for k, v in values.items() if v is not ...}
  file.write_text(json.dumps(values))
  refused(folder, "config.json", *words)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "[" * 100_000, "{"])
def test_a_config_that_is_no_object_is_refused(folder, text):
  (folder / "config.json").write_text(text)
  refused(folder, "config.json")


def llama3_frequencies(head_dim, theta, factor, low, high, original):
  """One frequency at a time, in float64, from the three cases of the paper."""
  out = []
  for i in range(head_dim // 2):
    frequency = theta ** (-2 * i / head_dim)
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
      out.append(frequency)
    elif wavelength > original / low:
      out.append(frequency / factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      out.append((1 - smooth) * frequency / factor + smooth * frequency)
  return np.array(out)


@pytest.mark.parametrize(
  "head_dim, theta, scaling",
  [(128, 5e5, (8.0, 1.0, 4.0, 8192)), (64, 5e5, (32.0, 1.0, 4.0, 8192)),
   (16, 1e4, (4.0, 2.0, 3.0, 100))],
  ids=["3.1", "3.2", "odd"],
)  # fmt: skip
def test_llama3_scaling_is_that_of_the_formula(head_dim, theta, scaling):
  mine = rope.rope_frequencies(
    head_dim, theta, rope.RopeScaling("llama3", *scaling)
  )
  wanted = llama3_frequencies(head_dim, theta, *scaling)
  plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  assert np.abs(plain / wanted - 1).max() > 0.5  # it does something
  np.testing.assert_allclose(mine, wanted, rtol=2e-6)


def test_both_spellings_of_rope_settings_mean_the_same():
  llama3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
  }  # fmt: skip
  new = {"rope_parameters": llama3 | {"rope_theta": 5e5}}
  old = {"rope_theta": 5e5, "rope_scaling": llama3}
  older = {
    "rope_theta": 5e5,
    "rope_scaling": {"type": "llama3"}
    | {k: v for k, v in llama3.items() if k != "rope_type"},
  }
  wanted = 5e5, rope.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
  for spelling in (new, old, older):
    assert rope.rope_from_hf(spelling) == wanted
  for entry in (None, {"rope_type": "default"}):
    plain = {"rope_theta": 7e4, "rope_scaling": entry}
    assert rope.rope_from_hf(plain) == (7e4, rope.RopeScaling())


def test_every_weight_of_the_model_has_a_name_and_no_name_is_idle():
  every = llama.Config(
    24, 8, 12, 2, 4, 2, 2, attention_bias=True, mlp_bias=True
  )
  ours = traverse.flatten_dict(abstract(every)["params"], sep="/").keys()
  scored = dataclasses.replace(every, scalar_head=True)
  ours |= traverse.flatten_dict(abstract(scored)["params"], sep="/").keys()
  assert sorted(ours) == sorted(llama.HF_NAMES)
