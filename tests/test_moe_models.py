"""Models with experts: packed rows, sampling, scores, meshes, configs."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mirrored_rows as rows
from devices import run_on_eight

from dpo_jax import score, sharding
from dpo_jax.accumulate import accumulate
from dpo_jax.batch import Router
from dpo_jax.errors import CheckpointError
from dpo_jax.models import (
  attention,
  decoder,
  grouped,
  hf,
  layers,
  mixtral,
  moe,
  qwen3_moe,
  rope,
)
from dpo_jax.sample import make_sampler

CONFIG = mixtral.Config(
  vocab_size=rows.VOCABULARY, width=24, ffn=20, layers=3, heads=6, kv_heads=2,
  head_dim=4, rope_theta=333.0, experts=5,
)  # fmt: skip
QWEN = qwen3_moe.Config(
  vocab_size=rows.VOCABULARY, width=16, ffn=12, layers=2, heads=4, kv_heads=2,
  head_dim=6, experts=7, experts_per_token=3, window=5, local=(True,),
)  # fmt: skip
# Sizes of a mesh, and the experts' ffn: the last is not divided.
MESHES = [(8, 1, 1, 20), (2, 2, 2, 20), (1, 8, 1, 20), (4, 1, 2, 15)]


pytestmark = pytest.mark.usefixtures("compile_quickly")


def make_model(config=CONFIG, dtype=jnp.float32, **compute):
  compute = decoder.Compute(dtype=dtype, param_dtype=dtype, **compute)
  return decoder.Decoder(config, compute)


def make_params(config=CONFIG, dtype=np.float32, seed=0):
  """Random weights large enough that experts and keys differ."""
  shapes = jax.eval_shape(make_model(config).init_variables, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(
      rng.normal(size=x.shape) / math.sqrt(max(x.shape[-1], 4) / 4), dtype
    ),
    shapes,
  )


def in_float64(monkeypatch):
  for module in (attention, decoder, layers, rope, moe, grouped, rows.logps):
    monkeypatch.setattr(module, "jnp", rows.Float64())


def test_mirrored_rows_equal_separate_sequences(monkeypatch):
  in_float64(monkeypatch)
  with jax.enable_x64(True):
    params = make_params(dtype=np.float64)
    model = make_model(dtype=jnp.float64)
    batch, examples = rows.packed(), rows.examples()
    weights = rows.cotangent(2 * len(examples))
    values, grads = rows.with_gradients(
      lambda p: rows.in_rows(p, model, batch, rows.PLACES).reshape(-1),
      params,
      weights,
    )
    expected, expected_grads = rows.with_gradients(
      lambda p: rows.separately(p, model, examples), params, weights
    )
    assert values.dtype == jnp.float64
    rows.assert_close(values, expected, 1e-10)
    jax.tree.map(
      lambda a, b: rows.assert_close(a, b, 2e-10), grads, expected_grads
    )
  assert np.abs(expected[:9]).min() > 0.1


def test_what_lies_in_the_padding_changes_nothing():
  params, batch = make_params(), rows.packed()
  run = jax.jit(functools.partial(score.Score(make_model()), router=True))
  unseen = batch.key_end == 0
  assert unseen.any()
  other = batch._replace(tokens=jnp.where(unseen, 3, batch.tokens))
  before, after = run(params, batch), run(params, other)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), before, after
  )
  count = (~unseen).sum(axis=1) * CONFIG.layers
  np.testing.assert_array_equal(before.router.tokens, count)
  load = before.router.load
  np.testing.assert_array_equal(load.sum(axis=1), 2 * count)
  np.testing.assert_allclose(before.router.probs.sum(axis=1), count, rtol=1e-5)
  assert (load.sum(axis=0) > 0).all()  # no expert is left out


def test_scores_are_the_same_with_and_without_the_router():
  params, batch = make_params(), rows.packed()
  run = score.Score(make_model(remat="block"))
  plain = jax.jit(run)(params, batch)
  full = jax.jit(functools.partial(run, router=True))(params, batch)
  assert plain.router is None
  np.testing.assert_array_equal(plain.logps, full.logps)
  dense = dataclasses.replace(CONFIG, experts=None)
  shapes = jax.eval_shape(
    functools.partial(score.Score(make_model(dense)), router=True),
    make_params(dense),
    batch,
  )
  assert shapes.router is None


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_policy_that_is_its_reference_scores_the_same_to_the_last_bit(remat):
  run = score.Score(make_model(remat=remat), tile=64)

  def both(params, batch):
    def loss(params):
      scores = run(params, batch, router=True)
      return scores.logps.sum() + moe.balance(*scores.router), scores.logps

    gradient, logps = jax.grad(loss, has_aux=True)(params)
    return logps, run(params, batch).logps, gradient

  name = "jax_disable_most_optimizations"
  jax.config.update(name, False)
  try:
    policy, reference, _ = jax.jit(both)(make_params(), rows.many_batches()[0])
  finally:
    jax.config.update(name, True)
  np.testing.assert_array_equal(policy, reference)
  assert policy.any()


def test_new_variables_are_weights_and_nothing_else():
  assert [*make_model().init_variables(jax.random.key(0))] == ["params"]


@pytest.mark.parametrize("coupled", [False, True])
def test_router_sums_go_through_microbatches(coupled):
  """A loss that is linear in them has the same gradient in parts."""
  params, batch = make_params(), rows.packed()
  batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), batch)
  run = score.Score(make_model())

  def objective(policy, reference, part):
    e = jnp.arange(1.0, 6)
    total = policy.logps.sum() + (policy.router.probs * e).sum()
    return total, {"load": policy.router.load.sum()}

  def gradients(microbatches):
    return accumulate(
      lambda p, part, _: run(p, part, router=True),
      lambda part: None,
      objective, params, batch, microbatches, coupled=coupled,
    )  # fmt: skip

  whole, parts = (jax.jit(gradients, static_argnums=0)(n) for n in (1, 2))
  jax.tree.map(lambda a, b: rows.assert_close(a, b, 2e-5), whole, parts)


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["mixtral", "qwen3"])
def test_greedy_tokens_are_those_of_no_cache(config):
  model, variables = make_model(config), make_params(config)
  rng = np.random.default_rng(4)
  prompts = [rng.integers(3, 31, n).tolist() for n in (1, 5, 21)]
  out = make_sampler(model, max_tokens=9, stop_ids=(-1,), temperature=0)(
    variables, prompts, 0
  )
  for prompt, tokens, logps in zip(prompts, out.tokens, out.logps):
    ids = jnp.asarray([prompt + tokens.tolist()])
    index = jnp.arange(ids.shape[1])[None]
    hidden = model.apply(variables, ids, index, index * 0, index + 1)
    logits = (hidden @ model.unembed(variables).T)[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), tokens)
    best = jax.nn.log_softmax(logits).max(axis=-1)
    np.testing.assert_allclose(logps, best, atol=5e-5)


# Devices


def scores_and_gradients(ffn, mesh=None):
  """Of eight rows, with the balancing loss; and the program's text."""
  config = dataclasses.replace(CONFIG, ffn=ffn)
  params, batch = make_params(config), rows.packed()
  # Rows of tokens that differ, so that no device's choices are another's.
  batch = jax.tree.map(lambda x: jnp.concatenate([x, x, x[:2]]), batch)
  shift = jnp.arange(8)[:, None] * (batch.key_end > 0)
  batch = batch._replace(tokens=(batch.tokens + shift) % rows.VOCABULARY)
  run = score.Score(make_model(config), tile=16)
  if mesh is not None:
    pins = sharding.Pins(mesh)
    params = jax.device_put(params, sharding.shard_tree(params, mesh))
    batch = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
    model = make_model(
      config, pin_activations=pins.activations, pin_weights=pins.weights,
      place_experts=pins.experts,
      remat="block" if mesh.shape["tensor"] == 2 else "none",
    )  # fmt: skip
    run = score.Score(model, tile=16, place_head=pins.head)

  def loss(params):
    scores = run(params, batch, router=True)
    value = jnp.tanh(scores.logps / 20).sum() + moe.balance(*scores.router)
    return value, scores

  step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
  found = jax.tree.leaves(step(params))
  return list(map(np.asarray, found)), step.as_text()


def on_eight_devices(out):
  assert jax.device_count() == 8
  jax.config.update("jax_disable_most_optimizations", True)
  for *sizes, ffn in MESHES:
    found, program = scores_and_gradients(ffn, sharding.make_mesh(*sizes))
    forbidden = "collective-permute|all-to-all"
    if sizes == [8, 1, 1]:  # with nothing else to gather, tokens are not
      forbidden += "|all-gather"
    moved = re.findall(forbidden, program)
    assert not moved, (sizes, moved)
    assert "all-reduce" in program
    np.savez(out / f"{sizes} {ffn}.npz", *found)


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
  """What the meshes gave, computed by one process that has eight devices."""
  out = tmp_path_factory.mktemp("eight")
  run_on_eight(__file__, str(out))
  return out


@functools.cache
def on_one_device(ffn):
  return scores_and_gradients(ffn)[0]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_give_the_numbers_of_one(eight_devices, mesh):
  *sizes, ffn = mesh
  found = np.load(eight_devices / f"{sizes} {ffn}.npz")
  expected = on_one_device(ffn)
  assert len(found.files) == len(expected)
  for name, b in zip(found.files, expected):
    rows.assert_close(found[name], b, 2e-5)


# config.json

MIXTRAL = {
  "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
  "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
  "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
QWEN3_MOE = MIXTRAL | {
  "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
  "moe_intermediate_size": 8,
}  # fmt: skip


def read(tmp_path, values):
  (tmp_path / "config.json").write_text(json.dumps(values))
  return hf.read_config(tmp_path)[1]


def test_what_is_absent_is_the_default_of_transformers(tmp_path):
  config = read(tmp_path, MIXTRAL)
  assert (config.experts, config.experts_per_token) == (8, 2)
  assert config.norm_topk and config.rope_theta == 1e6
  assert config.window is None and config.ffn == 24 and config.kv_heads == 8
  config = read(tmp_path, QWEN3_MOE)
  assert (config.experts, config.experts_per_token) == (128, 8)
  assert not config.norm_topk and config.rope_theta == 1e4
  assert config.window is None and config.ffn == 8 and config.kv_heads == 4


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_either_name(tmp_path, name):
  assert read(tmp_path, QWEN3_MOE | {name: 16}).experts == 16


@pytest.mark.parametrize(
  ("values", "words"),
  [
    (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    (MIXTRAL | {"num_local_experts": None}, "experts=None"),
    (MIXTRAL | {"num_local_experts": 1}, "experts_per_token=2 of experts=1"),
    (MIXTRAL | {"num_experts_per_tok": 0}, "experts_per_token=0"),
    (MIXTRAL | {"sliding_window": 8, "layer_types": ["full_attention"] * 2},
     "layer_types"),
    (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    (QWEN3_MOE | {"mlp_only_layers": [1]}, "mlp_only_layers=[1]"),
    (QWEN3_MOE | {"num_experts": 8, "num_local_experts": 9},
     "num_experts=8 and num_local_experts=9"),
    (QWEN3_MOE | {"num_experts": 0}, "experts=0"),
    (QWEN3_MOE | {"norm_topk_prob": "yes"}, "norm_topk='yes'"),
    (QWEN3_MOE | {"use_sliding_window": True, "max_window_layers": 1},
     "max_window_layers"),
    (QWEN3_MOE | {"model_type": "qwen2_moe"}, "'qwen2_moe'"),
  ],
  ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tmp_path, values, words):
  with pytest.raises(CheckpointError) as error:
    read(tmp_path, values)
  assert words in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "words"),
  [({"mlp_bias": True}, "mlp_bias"), ({"experts_per_token": 6}, "=6 of")],
)
def test_a_config_that_cannot_be_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CONFIG, **changes)


def test_balance_takes_a_router_as_it_is_named():
  assert Router._fields == ("load", "probs", "tokens")


if __name__ == "__main__":
  on_eight_devices(pathlib.Path(sys.argv[1]))
