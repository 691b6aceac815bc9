"""Adapters: what they compute, what of them is trained, PEFT's files, runs."""

import dataclasses
import functools
import json

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import losses, optim
from dpo_jax.data.pack import Example, RowShape, empty_batch, fill_row
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.models import llama, lora, peft
from dpo_jax.models.layers import Projection
from dpo_jax.models.lora import Lora
from dpo_jax.score import Score
from dpo_jax.train_step import train_step
from dpo_jax.trainable import Trainable, join
from dpo_jax.update import TrainState

CONFIG = llama.Config(
  vocab_size=24, width=8, ffn=12, layers=3, heads=4, kv_heads=2, head_dim=6
)
MODEL = llama.Model(CONFIG)
SCORE = Score(MODEL, tile=16)


pytestmark = pytest.mark.usefixtures("compile_quickly")


@functools.cache
def base():
  """Weights without adapters."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(MODEL.init_variables, jax.random.key(0))
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes
  )


def adapted(what, seed=1, fresh=False):
  """Variables with adapters that do something, unless fresh."""
  adapters = lora.init(jax.random.key(seed), base()["params"], what)
  rng = np.random.default_rng(seed)
  drawn = traverse.flatten_dict(adapters)
  for path, leaf in drawn.items():
    if path[-1] == "b" and not fresh:
      drawn[path] = jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)
  return base() | {"lora": traverse.unflatten_dict(drawn)}


def merged(variables):
  """The weights with the adapters in them, by plain matrix products."""
  params = traverse.flatten_dict(variables["params"], sep="/")
  adapters = traverse.flatten_dict(variables["lora"], sep="/")
  for path, w in params.items():
    where = path.removesuffix("/kernel")
    if f"{where}/a" not in adapters:
      continue
    a, b, scale = (adapters[f"{where}/{x}"] for x in ("a", "b", "scale"))
    parts = []
    for i in range(w.shape[0]):
      flat = a[i].reshape(-1, a.shape[-1]) @ b[i].reshape(b.shape[1], -1)
      parts.append(w[i] + scale[i] * flat.reshape(w.shape[1:]))
    params[path] = jnp.stack(parts)
  return {"params": traverse.unflatten_dict(params, sep="/")}


@functools.cache
def batch():
  rng = np.random.default_rng(5)
  made = empty_batch(2, RowShape(40, 24, 2))
  for row in range(2):
    ids = [rng.integers(3, 24, n).astype(np.int32) for n in (4, 6, 5)]
    fill_row(made, row, [Example(*ids)])
  return jax.tree.map(jnp.asarray, made)


def scores(variables, **options):
  return jax.jit(functools.partial(SCORE, **options))(variables, batch()).logps


def test_new_adapters_change_no_number_to_the_last_bit():
  with_them = scores(adapted(Lora(3), fresh=True))
  np.testing.assert_array_equal(with_them, scores(base()))


@pytest.mark.parametrize(
  "what",
  [
    Lora(3, alpha=5.0),
    Lora(2, alpha=3.0, targets=("q", "down"), rslora=True),
    Lora(4, targets=("o",)),
  ],
  ids=str,
)
def test_adapters_add_their_product_to_the_weights(what):
  variables = adapted(what)
  there = {name.split("/")[-2] for name in
           traverse.flatten_dict(variables["lora"], sep="/")}  # fmt: skip
  assert there == set(
    what.targets or ("q", "k", "v", "o", "gate", "up", "down")
  )
  ours = scores(variables)
  assert np.abs(ours - scores(base())).max() > 1e-2
  np.testing.assert_allclose(ours, scores(merged(variables)), rtol=2e-5)


def test_the_scale_is_alpha_over_the_rank_or_its_root():
  assert Lora(4, alpha=6.0).scale == 1.5
  assert Lora(4, alpha=6.0, rslora=True).scale == 3.0


def test_merging_part_by_part_is_the_sum():
  variables = adapted(Lora(3))
  merge = lora.merger(jax.device_get(variables["lora"]))
  expected = traverse.flatten_dict(merged(variables)["params"], sep="/")
  for path, leaf in traverse.flatten_dict(base()["params"], sep="/").items():
    indices = [(i,) for i in range(3)] if path.startswith("layers") else [()]
    for index in indices:
      part = merge(path, index, np.asarray(leaf[index]))
      np.testing.assert_allclose(part, expected[path][index], atol=1e-6)
      if not path.endswith("kernel"):
        np.testing.assert_array_equal(part, leaf[index])


def test_merging_keeps_the_dtype_of_the_weights():
  merge = lora.merger(jax.device_get(adapted(Lora(3))["lora"]))
  kernel = base()["params"]["layers"]["mlp"]["up"]["kernel"]
  part = np.asarray(kernel[0].astype(jnp.bfloat16))
  after = merge("layers/mlp/up/kernel", (0,), part)
  assert after.dtype == part.dtype
  assert (after != part).any()


def state_and_frozen(variables, tx):
  trained, frozen = Trainable(variables).split(variables)
  zero = jnp.int32(0)
  return TrainState(zero, trained, tx.init(trained), zero), frozen


def step_of(tx, **options):
  return jax.jit(
    functools.partial(
      train_step, score=SCORE, loss=losses.make("dpo"), tx=tx, **options
    )
  )


def test_only_adapters_are_trained_and_only_they_have_optimizer_state():
  tx = optim.make(lambda _: 1e-2)
  state, frozen = state_and_frozen(adapted(Lora(3)), tx)
  names = [name.split("/")[-1] for name in
           traverse.flatten_dict(state.params, sep="/")]  # fmt: skip
  assert set(names) == {"a", "b"} and len(names) == 14
  sizes = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sum(sizes) == 2 * sum(x.size for x in jax.tree.leaves(state.params))
  after, sums = step_of(tx)(state, base(), batch(), frozen)
  jax.tree.map(lambda x, y: np.any(x != y) or pytest.fail(), state.params,
               after.params)  # fmt: skip
  assert float(sums["grad_norm"].total) > 0


def test_the_first_loss_is_log_two_and_margins_are_nought_exactly():
  tx = optim.make(lambda _: 1e-2)
  state, frozen = state_and_frozen(adapted(Lora(3), fresh=True), tx)
  _, sums = step_of(tx)(state, {"params": frozen["params"]}, batch(), frozen)
  assert float(sums["rewards/margins"].total) == 0
  assert float(sums["loss"].mean()) == np.float32(np.log(2))


def test_gradients_are_those_through_the_merged_weights():
  variables = adapted(Lora(3, targets=("q", "o", "down")))
  trained, frozen = Trainable(variables).split(variables)

  def objective(whole):
    def total(trained):
      logps = SCORE(whole(join(frozen, trained)), batch()).logps
      return (logps[..., 0] - logps[..., 1]).sum()

    return jax.jit(jax.grad(total))(trained)

  ours, expected = objective(lambda x: x), objective(merged)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    ours, expected,
  )  # fmt: skip


def test_dropout_needs_a_key_and_keeps_the_mean():
  variables = adapted(Lora(3, dropout=0.4))
  plain = scores(variables)
  np.testing.assert_array_equal(plain, scores(adapted(Lora(3))))
  some = jax.jit(lambda key: SCORE(variables, batch(), dropout=key).logps)
  one, other = some(jax.random.key(1)), some(jax.random.key(2))
  assert (one != other).any() and (one != plain).any()
  np.testing.assert_array_equal(one, some(jax.random.key(1)))
  # A projection is linear in its input, so the mean of what it gives is exact.
  x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 8)), jnp.float32)
  layer = jax.tree.map(lambda x: x[0], variables)
  of_gate = {
    name: layer[name]["layers"]["mlp"]["gate"] for name in ("params", "lora")
  }
  gate = Projection((8,), (12,))
  keys = jax.random.split(jax.random.key(0), 4000)
  drawn = jax.vmap(lambda k: gate.apply(of_gate, x, rngs={"dropout": k}))(keys)
  mean = gate.apply(of_gate, x)
  spread = drawn.std(0) / np.sqrt(len(keys))
  assert (np.abs(drawn.mean(0) - mean) < 5 * spread + 1e-6).all()
  assert (drawn.std(0) > 1e-3).all()


@pytest.mark.slow
def test_every_step_and_part_of_a_batch_drops_something_else():
  tx = optim.make(lambda _: 0.0)
  variables = adapted(Lora(3, dropout=0.4))
  state, frozen = state_and_frozen(variables, tx)
  run = step_of(tx, dropout_seed=3)
  state, first = run(state, base(), batch(), frozen)
  _, second = run(state, base(), batch(), frozen)
  _, halves = step_of(tx, dropout_seed=3, microbatches=2)(
    state, base(), batch(), frozen
  )
  of_loss = [float(x["loss"].mean()) for x in (first, second, halves)]
  assert len(set(of_loss)) == 3
  _, none = step_of(tx)(state, base(), batch(), frozen)
  _, again = step_of(tx)(state._replace(step=state.step + 1), base(), batch(),
                         frozen)  # fmt: skip
  assert float(none["loss"].mean()) == float(again["loss"].mean())


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: Lora(0), "lora.rank=0"),
    (lambda: Lora(2, dropout=1.0), "lora.dropout=1.0"),
    (lambda: adapted(Lora(2, targets=("q", "query"))), "'query'"),
  ],
)
def test_settings_that_mean_nothing_are_refused(make, words):
  with pytest.raises(ConfigError) as error:
    make()
  assert words in str(error.value)


WHAT = Lora(3, alpha=5.0, targets=("q", "o", "up"), dropout=0.1, rslora=True)


def written(path, what=WHAT):
  variables = jax.device_get(adapted(what))
  peft.save(path, llama.HF_NAMES, variables["lora"], what, "the/base")
  return variables


def test_adapters_are_read_back_as_they_were_written(tmp_path):
  variables = written(tmp_path / "adapter")
  what = peft.read_config(tmp_path / "adapter")
  assert what == dataclasses.replace(WHAT, targets=())
  again = peft.read(
    tmp_path / "adapter", llama.HF_NAMES, base()["params"], what
  )
  jax.tree.map(np.testing.assert_array_equal, again, variables["lora"])
  assert not list(tmp_path.glob("*.part"))


def test_the_files_have_pefts_names_and_shapes(tmp_path):
  written(tmp_path / "adapter")
  tensors = safetensors.numpy.load_file(
    tmp_path / "adapter" / "adapter_model.safetensors"
  )
  layer = "base_model.model.model.layers.2."
  assert len(tensors) == 3 * 3 * 2
  assert tensors[f"{layer}self_attn.o_proj.lora_A.weight"].shape == (3, 24)
  assert tensors[f"{layer}mlp.up_proj.lora_B.weight"].shape == (12, 3)
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert config["target_modules"] == ["o_proj", "q_proj", "up_proj"]
  assert config["base_model_name_or_path"] == "the/base"


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"peft_type": "IA3"}, "'IA3'"),
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "all"}, "bias='all'"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"r": "8"}, "r='8'"),
    ({"use_rslora": "no"}, "use_rslora='no'"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"something_of_tomorrow": 3}, "something_of_tomorrow=3"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"r": 4}, "expected [4, 24]"),
    ({"lora_alpha": None}, "lora_alpha=None"),
    ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
  ],
  ids=str,
)
def test_adapters_that_mean_something_else_are_refused_by_name(
  tmp_path, changes, words
):
  written(tmp_path / "adapter")
  file = tmp_path / "adapter" / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(CheckpointError) as error:
    what = peft.read_config(tmp_path / "adapter")
    peft.read(tmp_path / "adapter", llama.HF_NAMES, base()["params"], what)
  assert words in str(error.value)
  assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda t: t.popitem(), "is missing, of all layers"),
    (lambda t: t.clear(), "no tensors in it"),
    (
      lambda t: t.update({"base_model.model.lm_head.lora_A.weight":
                          np.zeros((3, 8), np.float32)}),
      "lm_head.lora_A.weight",
    ),
  ],
)  # fmt: skip
def test_adapters_of_another_model_are_refused(tmp_path, change, words):
  written(tmp_path / "adapter")
  file = tmp_path / "adapter" / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)
  what = peft.read_config(tmp_path / "adapter")
  with pytest.raises(CheckpointError) as error:
    peft.read(tmp_path / "adapter", llama.HF_NAMES, base()["params"], what)
  assert words in str(error.value)


def test_a_damaged_file_of_adapters_is_refused(tmp_path):
  written(tmp_path / "adapter")
  file = tmp_path / "adapter" / "adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(CheckpointError, match="cannot read adapters"):
    peft.read(tmp_path / "adapter", llama.HF_NAMES, base()["params"], Lora(3))
