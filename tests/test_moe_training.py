"""The balancing loss of experts in the step, and whole runs of such a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import compile_once, small_config  # noqa: F401

from dpo_jax import losses, optim
from dpo_jax.data.corpus import write_corpus
from dpo_jax.data.pack import Example, RowShape, empty_batch, fill_row
from dpo_jax.errors import ConfigError
from dpo_jax.models import hf, mixtral, moe
from dpo_jax.run import Run
from dpo_jax.score import Score
from dpo_jax.train import train
from dpo_jax.train_step import train_step
from dpo_jax.update import TrainState

pytestmark = pytest.mark.usefixtures("compile_quickly")

MODEL = mixtral.Model(
  mixtral.Config(
    vocab_size=24, width=8, ffn=12, layers=2, heads=2, kv_heads=2, head_dim=4,
    experts=4, experts_per_token=2,
  )
)  # fmt: skip
SCORE = Score(MODEL, tile=16)


@functools.cache
def params():
  return MODEL.init_variables(jax.random.key(0))


@functools.cache
def batch():
  rng = np.random.default_rng(5)
  made = empty_batch(4, RowShape(40, 24, 2))
  for row in range(3):  # the fourth is empty
    ids = [rng.integers(3, 24, n).astype(np.int32) for n in (4, 6 - row, 5)]
    fill_row(made, row, [Example(*ids)])
  return made


def one_step(weight, microbatches=1):
  tx = optim.make(optax.constant_schedule(1.0), name="sgd", clip_norm=0.0)
  zero = jnp.int32(0)
  state = TrainState(zero, params(), tx.init(params()), zero)
  step = jax.jit(
    functools.partial(
      train_step, score=SCORE, loss=losses.make("dpo"), tx=tx,
      router_balance=weight, microbatches=microbatches,
    )
  )  # fmt: skip
  after, sums = step(state, params(), batch())
  return jax.tree.map(jnp.subtract, params(), after.params), sums


def test_the_gradient_is_that_of_the_sum_of_both_losses():
  at_first = params()

  def total(variables):
    out = SCORE(variables, batch(), router=True)
    gap = out.logps[..., 0] - out.logps[..., 1]
    reference = SCORE(at_first, batch()).logps
    gap -= reference[..., 0] - reference[..., 1]
    dpo = -jax.nn.log_sigmoid(0.1 * gap) * batch().weights
    balance = moe.balance(*out.router)
    return dpo.sum() / batch().weights.sum() + 0.7 * balance, balance

  expected, balance = jax.jit(jax.grad(total, has_aux=True))(at_first)
  moved, sums = one_step(0.7)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    moved, expected,
  )  # fmt: skip
  np.testing.assert_allclose(sums["aux_loss"].mean(), balance, rtol=1e-6)
  np.testing.assert_allclose(sums["loss"].mean(), np.log(2), rtol=1e-6)
  assert abs(balance - 2) > 1e-3  # k, if all were equally busy


def test_the_balance_is_of_the_batch_however_many_parts_it_has():
  whole, sums = one_step(0.7)
  parts, of_parts = one_step(0.7, microbatches=2)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    whole, parts,
  )  # fmt: skip
  np.testing.assert_allclose(
    of_parts["aux_loss"].mean(), sums["aux_loss"].mean(), rtol=1e-6
  )


def test_without_a_weight_nothing_is_added():
  _, sums = one_step(0.0)
  assert "aux_loss" not in sums
  assert np.abs(one_step(0.0)[0]["params"]["embed"]).max() > 0


FROM_SCRATCH = {
  "model.family": "qwen3_moe",
  "model.experts": 4,
  "model.experts_per_token": 2,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_with_experts_trains_and_is_exported(corpus, tmp_path, rank):
  changes = {"train.router_balance": 10.0, "lora.rank": rank}
  # In fewer steps adapters move ten held-out pairs less than chance does.
  changes |= {"train.steps": 18, "train.eval_every": 0}
  config = small_config(corpus, **FROM_SCRATCH, **changes)
  summary = train(config, tmp_path / "run")
  assert summary["final_eval"]["loss"] < summary["initial_eval"]["loss"]
  _, shape = hf.read_config(tmp_path / "run" / "model")
  assert (shape.experts, shape.experts_per_token) == (4, 2)
  rows = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert '"aux_loss"' in rows


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.experts": 4}, "'llama' has no experts"),
    (FROM_SCRATCH | {"lora.rank": 2, "lora.targets": "up"}, "'up'"),
    (FROM_SCRATCH | {"model.experts_per_token": 5}, "experts_per_token"),
  ],
  ids=str,
)
def test_experts_that_are_not_there_are_refused(corpus, changes, words):
  with pytest.raises(ConfigError) as error:
    Run(small_config(corpus, **changes))
  assert words in str(error.value)
