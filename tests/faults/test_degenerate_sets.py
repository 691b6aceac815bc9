"""No rows, one row, fewer than a batch, a ragged end: the right numbers or one
clear line."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from runs import compile_once, metric_rows, small_config  # noqa: F401

from dpo_jax import evaluate, losses, sharding
from dpo_jax.check_data import check
from dpo_jax.data.plan import Plan
from dpo_jax.errors import ConfigError, DataError
from dpo_jax.run import Run
from dpo_jax.train import train

pytestmark = pytest.mark.usefixtures("compile_quickly")
BARE = {
  "data.eval_rows": 0, "sample.prompts": 0, "train.export": False,
  "train.eval_every": 0, "train.checkpoint_every": 0, "train.log_every": 1,
  "train.steps": 3,
}  # fmt: skip


def pairs(n):
  return [
    {
      "prompt": f"Q{i}:",
      "chosen": " yes" * (i % 5 + 1),
      "rejected": " no" * (i % 3 + 1),
    }
    for i in range(n)
  ]


def config_of(tmp_path, rows, **changes):
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return small_config({"pairs": path}, **BARE | changes)


SAME = {"prompt": "Q", "chosen": "a", "rejected": "a"}


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
  ("rows", "words"),
  [
    ([], "no rows in split 'train'"),
    ([SAME] * 3, "no example left of 3 rows (identical_responses 3)"),
  ],
  ids=["no rows", "all dropped"],
)
def test_nothing_to_train_on_is_one_line(tmp_path, command, rows, words):
  config = config_of(tmp_path, rows)
  with pytest.raises(DataError) as caught:
    train(config, tmp_path / "run") if command == "train" else check(config)
  assert words in str(caught.value) and "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("held_out", [1, 2, 9])
def test_holding_out_all_there_is_is_one_line(tmp_path, held_out):
  config = config_of(tmp_path, pairs(1), **{"data.eval_rows": held_out})
  with pytest.raises(ConfigError, match="leaves nothing to train on"):
    train(config, tmp_path / "run")


def test_a_completion_without_another_to_mismatch_is_one_line(tmp_path):
  rows = [{"prompt": "Q", "completion": " a", "label": True}]
  config = config_of(tmp_path, rows, **{"loss.name": "kto"})
  with pytest.raises(ConfigError, match="batch_size >= 2"):
    train(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("loss", "n"), [("dpo", 1), ("dpo", 3), ("bco", 1), ("orpo", 3)]
)
def test_fewer_rows_than_a_batch_are_repeated_to_fill_it(tmp_path, loss, n):
  config = config_of(
    tmp_path, pairs(n), **{"loss.name": loss, "train.batch_size": 4}
  )
  run = Run(config)
  count = len(run.data.train)  # of a pair bco makes two
  for step in range(3):
    batch, ids = run.train_plan[step]
    there = ids[ids >= 0]
    assert len(there) == 4 == batch.weights.sum()
    # As evenly as they go, whole epochs one behind the other.
    seen = np.bincount(there, minlength=count)
    assert seen.max() - seen.min() <= 1 + (4 % count > 0)
  summary = train(config, tmp_path / "run")
  rows = [r for r in metric_rows(tmp_path / "run") if r["split"] == "train"]
  assert len(rows) == 3 and summary["skipped_steps"] == 0
  assert all(math.isfinite(r["loss"]) for r in rows)
  if loss == "dpo":
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows[2]["loss"] < rows[0]["loss"]  # it learns the one pair by heart


def test_one_row_alone_has_the_gradient_of_a_batch_of_it(tmp_path):
  changed = {}
  for size in (1, 4):
    config = config_of(
      tmp_path, pairs(1), **{"train.batch_size": size, "train.steps": 1}
    )
    run = Run(config)
    state, frozen = run.start()
    reference = run.load_reference(state.params, frozen)
    batch = sharding.put_batch(run.train_plan[0][0], run.built.mesh)
    state, sums = run.step(state, reference, batch, frozen)
    changed[size] = jax.device_get(
      (sums["grad_norm"].mean(), sums["loss"].mean())
    )
  np.testing.assert_allclose(changed[1], changed[4], rtol=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "sft", "bco"])
def test_a_ragged_last_batch_counts_each_example_once(tmp_path, loss):
  """Seven examples in batches of 1 to 16, by the model itself."""
  kind = losses.make(loss).kind
  rows = pairs(7)
  if kind == "sft":
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
  config = config_of(tmp_path, rows)
  config = dataclasses.replace(config, loss={"name": loss})
  run = Run(config)
  state, frozen = run.start()
  policy = {"params": jax.tree.map(lambda x: x * 1.3, state.params["params"])}
  reference = run.load_reference(state.params, frozen)
  found = []
  for size in (1, 2, 3, 7, 16):
    plan = Plan(
      run.data.train, batch_size=size, shuffle=False, row_length=64,
      rows_multiple=1, mismatch=False,
    )  # fmt: skip
    assert len(plan) == -(-len(run.data.train) // size)
    found.append(run.evaluator(policy, reference, plan).means)
  if loss == "bco":  # its shift is the batch's own, by definition
    found = [{k: v for k, v in f.items() if "logps" in k} for f in found]
  for other in found[1:]:
    assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)


def test_scores_do_not_depend_on_the_batches_they_were_made_in(tmp_path):
  run = Run(config_of(tmp_path, pairs(7)))
  state, _ = run.start()
  scores = [
    evaluate.score_examples(
      run.built.score, state.params,
      Plan(run.data.train, batch_size=size, shuffle=False, row_length=64),
      run.built.mesh,
    ).logps
    for size in (1, 4, 7, 50)
  ]  # fmt: skip
  for other in scores[1:]:
    np.testing.assert_allclose(other, scores[0], rtol=1e-5)
