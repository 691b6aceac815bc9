"""Precisions that a config can ask for, against float32: what is rounded, what
never is, and that policy and reference stay one code path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses, optim
from dpo_jax.data.pack import Example, RowShape, empty_batch, fill_row
from dpo_jax.models import gemma2, llama, lora, mixtral
from dpo_jax.models.lora import Lora
from dpo_jax.score import Score
from dpo_jax.train_step import train_step
from dpo_jax.trainable import Trainable
from dpo_jax.update import TrainState

F32, BF16 = jnp.float32, jnp.bfloat16
SIZES = {
  "vocab_size": 60, "width": 32, "ffn": 48, "layers": 2, "heads": 4,
  "kv_heads": 2, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
  "llama": (llama, {}),
  "gemma2": (gemma2, {"window": 6}),
  "mixtral": (mixtral, {"experts": 4}),
}
# Compute and weights, as `model.dtype` and `model.param_dtype` say.
KINDS = {"float32": (F32, F32), "mixed": (BF16, F32), "bfloat16": (BF16, BF16)}


pytestmark = pytest.mark.usefixtures("compile_quickly")


def batch():
  rng = np.random.default_rng(5)
  made = empty_batch(2, RowShape(60, 40, 2))
  for row in range(2):
    ids = [rng.integers(3, 60, n).astype(np.int32) for n in (9, 12, 11)]
    fill_row(made, row, [Example(*ids)])
  return made


@functools.cache
def weights(family):
  module, options = FAMILIES[family]
  model = module.Model(module.Config(**SIZES | options))
  shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
  rng = np.random.default_rng(1)

  # On bfloat16's grid, so that storing them so rounds nothing.
  def draw(path, x):
    mean = 0.0 if "scale" not in str(path) else 1.0 - (family == "gemma2")
    drawn = rng.normal(mean, 0.15, x.shape)
    return np.asarray(jnp.asarray(drawn, BF16), np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def one_step(family, kind, rank=0):
  """State before and after, sums, and the scores before."""
  module, options = FAMILIES[family]
  dtype, param_dtype = KINDS[kind]
  compute = module.Compute(dtype=dtype, param_dtype=param_dtype)
  score = Score(module.Model(module.Config(**SIZES | options), compute))
  base = jax.tree.map(lambda x: jnp.asarray(x, param_dtype), weights(family))
  variables = dict(base)
  if rank:
    what = Lora(rank, targets=("q", "o"))
    variables["lora"] = lora.init(jax.random.key(1), base["params"], what)
  trained, frozen = Trainable(variables).split(variables)
  tx = optim.make(lambda _: 1e-2)
  zero = jnp.int32(0)
  state = TrainState(zero, trained, tx.init(trained), zero)
  step = jax.jit(
    functools.partial(train_step, score=score, loss=losses.make("dpo"), tx=tx)
  )
  after, sums = step(state, base, batch(), frozen)
  return state, after, sums, jax.jit(score)(variables, batch())


@pytest.mark.parametrize("kind", ["mixed", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_float32_and_off_by_the_rounding_of_activations(
  family, kind
):
  *_, exact = one_step(family, "float32")
  *_, rounded = one_step(family, kind)
  assert rounded.logps.dtype == F32
  there = exact.logps != 0
  off = np.abs(rounded.logps - exact.logps)[there] / np.abs(exact.logps)[there]
  # 2 layers of a dozen roundings of 2^-9 each, most of which average out.
  assert 1e-6 < off.max() < 0.02
  # Sums of 12 tokens, about -50: a bfloat16 there would move in steps of 0.25.
  assert (rounded.logps[there] % 0.25 != 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("family", "rank"),
  [("llama", 0), ("llama", 3), ("gemma2", 0), ("mixtral", 0)],
)
def test_margins_are_nought_at_the_reference_in_every_precision(
  family, kind, rank
):
  _, _, sums, _ = one_step(family, kind, rank)
  # Compiled with its backward the policy may round otherwise (README, "Numbers
  # to rely on"): by float32, whatever it computes in.
  assert abs(sums["rewards/margins"].mean()) <= 2e-6
  np.testing.assert_allclose(sums["loss"].mean(), np.log(2), atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_optimizer_have_the_dtype_of_the_config(kind):
  _, after, sums, _ = one_step("llama", kind)
  _, param_dtype = KINDS[kind]
  for tree in (after.params, after.opt_state):
    floats = [x for x in jax.tree.leaves(tree) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype(param_dtype)}
  assert {x.total.dtype for x in sums.values()} == {jnp.dtype(F32)}


def test_adapters_are_float32_on_a_bfloat16_base():
  before, after, _, _ = one_step("llama", "bfloat16", rank=3)
  for tree in (after.params, after.opt_state):
    floats = [x for x in jax.tree.leaves(tree) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype(F32)}
  assert any(
    (x != y).any()
    for x, y in zip(
      jax.tree.leaves(before.params), jax.tree.leaves(after.params)
    )
  )


def test_the_gradient_of_mixed_precision_points_where_float32s_does():
  def moved(kind):
    before, after, sums, _ = one_step("llama", kind)
    parts = jax.tree.map(
      lambda x, y: np.ravel(x - y), before.params, after.params
    )
    return np.concatenate(jax.tree.leaves(parts)), sums["grad_norm"].mean()

  exact, norm = moved("float32")
  mixed, near = moved("mixed")
  np.testing.assert_allclose(near, norm, rtol=0.02)
  cosine = exact @ mixed / np.linalg.norm(exact) / np.linalg.norm(mixed)
  assert cosine > 0.95  # of Adam's first step: signs, mostly
