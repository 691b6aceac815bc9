"""Whole online runs: they learn, they stop and go on, and what becomes of
rewards that fail."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from online_runs import online_config
from runs import compile_once, metric_rows, stop_after  # noqa: F401
from safetensors.numpy import load_file

from dpo_jax import sharding
from dpo_jax.batch import Scores
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.convert import convert
from dpo_jax.data.corpus import write_corpus
from dpo_jax.errors import ConfigError
from dpo_jax.online import OnlineRun
from dpo_jax.online.held_out import TRAINING
from dpo_jax.online.pairs import pairs_of
from dpo_jax.sample import Sampled
from dpo_jax.train import Stopped, train

METHODS = ("ppo", "grpo", "pairs")
EACH = ["ppo", *(pytest.param(x, marks=pytest.mark.slow) for x in METHODS[1:])]
CLOCKS = ("rollout_seconds", "update_seconds")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.fixture(scope="module", params=EACH)
def finished(request, corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp(request.param) / "run"
  config = online_config(corpus, request.param)
  return config, train(config, workdir), workdir


def rows(workdir):
  return [
    {k: v for k, v in row.items() if k not in CLOCKS}
    for row in metric_rows(workdir)
  ]


def trained(workdir, config):
  run = OnlineRun(config)
  with Checkpoints(workdir / "checkpoints") as saved:
    state = saved.restore(config.train.steps, run.abstract_state)
  return jax.device_get((state.params, state.loss_state))


def test_the_reward_rises(finished):
  _, _, workdir = finished
  scores = [
    r["objective/scores"] for r in rows(workdir) if r["split"] == "train"
  ]
  assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.05


def test_held_out_prompts_are_answered_before_and_after(finished):
  config, summary, workdir = finished
  first, last = (r for r in rows(workdir) if r["split"] == "eval")
  assert summary["initial_eval"] == {
    k: v for k, v in first.items() if k not in ("step", "split")
  }
  assert last["objective/scores"] > first["objective/scores"] + 0.05
  assert first["objective/kl"] == 0  # nothing has moved yet
  assert last["objective/kl"] > 0.1
  assert summary["eval_examples"] == config.data.eval_rows
  assert 0 < summary["fill"] <= 1


def test_a_stopped_run_answers_and_learns_the_same(
  finished, tmp_path, monkeypatch
):
  config, _, workdir = finished
  stop_after(monkeypatch, 5)
  with pytest.raises(Stopped):
    train(config, tmp_path / "run")
  monkeypatch.undo()
  train(config, tmp_path / "run")
  assert rows(tmp_path / "run") == rows(workdir)
  same = jax.tree.map(
    np.array_equal, trained(tmp_path / "run", config), trained(workdir, config)
  )
  assert jax.tree.all(same)


def test_settings_of_an_online_run_may_be_allowed_to_differ(finished):
  config, summary, workdir = finished
  changed = config.online.missing_end + 0.5
  online = dataclasses.replace(config.online, missing_end=changed)
  other = dataclasses.replace(config, online=online)
  with pytest.raises(ConfigError, match=r"online\.missing_end"):
    train(other, workdir)
  allowed = train(other, workdir, ["online.missing_end"])
  assert allowed["steps"] == summary["steps"]


def test_a_checkpoint_converts_to_the_policy_alone(finished, tmp_path):
  config, _, workdir = finished
  convert(workdir, tmp_path / "served")
  params, _ = trained(workdir, config)
  served = load_file(tmp_path / "served" / "model.safetensors")
  np.testing.assert_array_equal(
    served["model.embed_tokens.weight"], params["params"]["embed"]
  )
  assert not any("score" in name for name in served)


def test_a_single_update_starts_at_the_policy_that_answered(finished):
  config, _, workdir = finished
  if config.online.epochs * config.online.minibatches == 1:
    for row in rows(workdir):
      assert abs(row.get("ratio", 1.0) - 1) < 1e-5


def test_pairs_are_the_ordinary_step_on_the_best_and_the_worst(corpus):
  # Not adam, to which a gradient of rounding is as good as any.
  config = online_config(corpus, "pairs", **{"optim.name": "sgd"})
  run = OnlineRun(config)
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  variables = run.policy(frozen, state.params)
  rollout = run._roller(
    variables, run.data.train, run.train_plan.members(0), 3, TRAINING, 0
  )
  pairs = pairs_of(rollout.scores)
  part = run._updates._pack_pairs(
    rollout.prompts, pairs.responses(rollout), range(len(rollout.prompts))
  )
  weights = np.where(part.ids >= 0, pairs.weights[part.ids], 0)
  batch = part.batch._replace(weights=weights.astype(np.float32))
  scored = run.built.score(reference, batch)
  batch = batch._replace(reference=Scores(np.asarray(scored.logps)))
  want, sums = run._updates._update(
    jax.tree.map(lambda x: x + 0, state), None,
    sharding.put_batch(batch, run.built.mesh), frozen,
  )  # fmt: skip
  got, told = run.step(state, reference, (), frozen)
  assert int(got.step) == 1
  for one, other in zip(
    *map(jax.tree.leaves, (got.params, want.params)), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
  np.testing.assert_allclose(told["loss"].mean(), sums["loss"].mean(), 1e-5)
  best = [max(x) for x in rollout.scores]
  assert [s[i] for s, i in zip(rollout.scores, pairs.chosen)] == best


def test_answers_that_have_no_reward_are_counted_and_left_out(corpus, tmp_path):
  for method in METHODS:
    config = online_config(
      corpus, method, **{"online.reward": "online_runs:moody", "train.steps": 2}
    )
    train(config, tmp_path / method)
    row = [r for r in rows(tmp_path / method) if r["split"] == "train"][-1]
    answers = config.train.batch_size * config.online.group
    assert 0 < row["rewards/failed"] < answers
    numbers = [v for k, v in row.items() if k not in ("split", "step")]
    assert all(map(math.isfinite, numbers))


def test_a_reward_that_fails_on_every_answer_ends_the_run_in_one_line(
  corpus, tmp_path
):
  config = online_config(
    corpus, "grpo", **{"online.reward": "online_runs:never"}
  )
  with pytest.raises(ConfigError) as error:
    train(config, tmp_path / "run")
  message = str(error.value)
  assert "\n" not in message
  assert "online_runs:never" in message and "ValueError: no opinion" in message


def test_equal_rewards_move_nothing_but_by_the_kl(corpus, tmp_path):
  for method in ("grpo", "pairs"):
    changes = {"online.reward": "online_runs:always_one", "train.steps": 1}
    if method == "grpo":
      changes["online.kl"] = 0.0
    config = online_config(corpus, method, **changes)
    train(config, tmp_path / method)
    row = [r for r in rows(tmp_path / method) if r["split"] == "train"][-1]
    assert row["frac_reward_zero_std"] == 1
    assert row["grad_norm"] == 0


def test_an_answer_without_an_end_costs_what_was_said(corpus):
  config = online_config(corpus, "grpo")
  run = OnlineRun(config)
  state, frozen = run.start()
  policy = run.policy(frozen, state.params)
  ask = policy, run.data.train, np.arange(8), 3, TRAINING, 0
  plain = run._roller(*ask)
  run._roller._missing_end = 0.5
  dearer = run._roller(*ask)
  np.testing.assert_array_equal(plain.tokens, dearer.tokens)
  np.testing.assert_allclose(
    dearer.scores, plain.scores - 0.5 * ~plain.ended, atol=1e-6
  )
  assert not plain.ended.all()


def test_an_online_run_is_another_run_with_another_seed(corpus):
  config = online_config(corpus, "grpo")
  other = dataclasses.replace(config, seed=1)
  first, second = (OnlineRun(c).train_plan.members(0) for c in (config, other))
  assert not np.array_equal(first, second)


@pytest.mark.parametrize("method", EACH)
def test_empty_answers_are_counted_and_survived(corpus, method):
  """A policy that ends at once: of each answer the end token alone is there."""
  run = OnlineRun(online_config(corpus, method))
  end, pad = run.built.tokenizer.eos_id, run.built.tokenizer.pad_id

  def at_once(variables, prompts, seed):
    tokens = np.full((len(prompts), 8), pad, np.int32)
    tokens[:, 0] = end
    lengths = np.ones(len(prompts), np.int32)
    return Sampled(tokens, np.zeros(tokens.shape, np.float32), lengths)

  run._roller._sampler = at_once
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  state, sums = run.step(state, reference, (), frozen)
  assert sums["completions/empty_ratio"].mean() == 1
  assert sums["completions/mean_length"].mean() == 1
  assert sums["objective/scores"].mean() == 0
  assert sums["rewards/failed"].mean() == sums["skipped"].mean() == 0
  assert all(
    jax.tree.leaves(
      jax.tree.map(lambda x: np.isfinite(x).all(), jax.device_get(state.params))
    )
  )


def test_adapters_learn_from_answers_and_the_base_is_their_reference(corpus):
  run = OnlineRun(online_config(corpus, "grpo", **{"lora.rank": 2}))
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  before = jax.device_get(state.params)
  state, sums = run.step(state, reference, (), frozen)
  assert set(state.params) == {"lora"} and set(reference) == {"params"}
  assert sums["objective/kl"].mean() == 0  # adapters that add nothing yet
  assert sums["grad_norm"].mean() > 0 == sums["skipped"].mean()
  same = jax.tree.map(np.array_equal, before, jax.device_get(state.params))
  assert not all(jax.tree.leaves(same))


@pytest.mark.slow
def test_parts_of_an_update_change_no_number(corpus):
  found = []
  for parts in (1, 2):
    config = online_config(
      corpus,
      "ppo",
      **{
        "train.microbatches": parts,
        "online.epochs": 1,
        "online.minibatches": 1,
        "optim.name": "sgd",
      },
    )
    run = OnlineRun(config)
    state, frozen = run.start()
    reference = run.load_reference(state.params, frozen)
    state, sums = run.step(state, reference, (), frozen)
    found.append(
      (
        sums["loss"].mean(),
        sums["grad_norm"].mean(),
        jax.device_get(state.params),
      )
    )
  (loss, norm, params), (other, other_norm, others) = found
  np.testing.assert_allclose(other, loss, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(other_norm, norm, rtol=1e-4)
  for x, y in zip(*map(jax.tree.leaves, (params, others)), strict=True):
    np.testing.assert_allclose(y, x, atol=1e-5)
