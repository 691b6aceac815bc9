"""Whole runs: what they leave behind, and what stopping them changes."""

import dataclasses
import json
import logging
import pathlib
import runpy
import shutil
import signal
import weakref
from unittest import mock

import jax
import numpy as np
import pytest
from runs import (  # noqa: F401
  STEPS,
  compile_once,
  metric_rows,
  small_config,
  stop_after,
)

from dpo_jax import checkpoint, stored
from dpo_jax import train as train_module
from dpo_jax.data.corpus import write_corpus
from dpo_jax.errors import CheckpointError, ConfigError, UserError
from dpo_jax.models import hf
from dpo_jax.run import Run
from dpo_jax.train import Stopped, train
from dpo_jax.workdir import Workdir
from dpo_jax.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished") / "run"
  return train(small_config(corpus), workdir), workdir


def test_a_run_leaves_what_the_readme_promises(finished):
  summary, workdir = finished
  names = {path.name for path in workdir.iterdir()}
  assert names == {
    "checkpoints",
    "config.json",
    "metrics.jsonl",
    "model",
    "report.html",
    "samples.jsonl",
    "summary.json",
  }
  assert json.loads((workdir / "summary.json").read_text()) == json.loads(
    json.dumps(summary)
  )
  assert summary["final_eval"]["loss"] != summary["initial_eval"]["loss"]
  sample = json.loads((workdir / "samples.jsonl").read_text().split("\n")[0])
  assert {"prompt", "before", "after"} <= sample.keys()


def test_dpo_starts_at_log_two_exactly_and_accuracy_one_half(finished):
  summary, _ = finished
  assert summary["initial_eval"]["loss"] == np.float32(np.log(2))
  assert summary["initial_eval"]["rewards/accuracies"] == 0.5


def test_the_exported_model_is_the_trained_one(corpus, finished):
  _, workdir = finished
  config = small_config(corpus)
  run = Run(config)
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    state = saved.restore(STEPS, run.abstract_state)
  again = hf.load_variables(
    workdir / "model", run.built.family.HF_NAMES, run.built.abstract
  )
  jax.tree.map(np.testing.assert_array_equal, state.params, again)


@pytest.mark.parametrize(
  "stop", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5))]
)
def test_a_stopped_run_continues_to_the_same_numbers(
  corpus, finished, tmp_path, monkeypatch, stop
):
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    stop_after(patch, stop)
    with pytest.raises(Stopped, match=f"step {stop}"):
      train(small_config(corpus), workdir)
  assert not (workdir / "summary.json").exists()
  train(small_config(corpus), workdir)
  assert metric_rows(workdir) == metric_rows(finished[1])
  for name in ("model.safetensors", "config.json"):
    ours = (workdir / "model" / name).read_bytes()
    assert ours == (finished[1] / "model" / name).read_bytes()


def test_evaluation_and_saving_do_not_count_as_time_of_the_steps(
  corpus, tmp_path, monkeypatch
):
  now = [0.0]
  monkeypatch.setattr(train_module.time, "perf_counter", lambda: now[0])
  real_add, real_save = train_module.StepLog.add, checkpoint.Checkpoints.save
  monkeypatch.setattr(
    train_module.StepLog, "add", lambda *a: (_pass(now, 1), real_add(*a))
  )
  monkeypatch.setattr(
    checkpoint.Checkpoints, "save", lambda *a: (_pass(now, 9), real_save(*a))
  )
  config = small_config(
    corpus, **{"train.checkpoint_every": 1, "train.log_every": 1,
               "sample.prompts": 0, "train.export": False}
  )  # fmt: skip
  train(config, tmp_path / "run")
  rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
  speeds = [r["pairs_per_second"] for r in rows if "pairs_per_second" in r]
  assert speeds == [config.train.batch_size] * (STEPS - 1)


def _pass(now, seconds):
  now[0] += seconds


def test_a_stopped_quickstart_ends_without_a_traceback(
  tmp_path, monkeypatch, capsys
):
  quickstart = runpy.run_path(str(ROOT / "scripts" / "quickstart.py"))
  stop = mock.Mock(side_effect=Stopped("stopped at step 7"))
  monkeypatch.setattr(train_module, "train", stop)
  log = logging.getLogger("dpo_jax")  # which is set up by a command
  for name in ("handlers", "level", "propagate"):
    monkeypatch.setattr(log, name, getattr(log, name))
  monkeypatch.setattr("sys.argv", ["quickstart.py", f"--workdir={tmp_path}"])
  end = mock.Mock(side_effect=SystemExit)
  monkeypatch.setattr("dpo_jax.processes.end", end)
  with pytest.raises(SystemExit):
    quickstart["main"]()
  end.assert_called_once_with(75)
  assert capsys.readouterr().out.endswith("stopped at step 7\n")


def test_a_finished_run_is_not_run_again(corpus, finished, monkeypatch):
  summary, workdir = finished
  monkeypatch.setattr(train_module, "finish", pytest.fail)
  assert train(small_config(corpus), workdir)["steps"] == summary["steps"]


@pytest.mark.slow
def test_settings_that_change_no_number_may_change_on_the_way(
  corpus, finished, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Stopped):
      train(small_config(corpus), workdir)
  train(
    small_config(corpus, **{"train.microbatches": 2, "model.remat": "block"}),
    workdir,
  )
  ours, whole = metric_rows(workdir)[-1], metric_rows(finished[1])[-1]
  for key in whole:
    if key != "split":
      np.testing.assert_allclose(ours[key], whole[key], rtol=1e-4, atol=1e-5)


def test_a_directory_of_another_run_is_refused_with_both_sides(
  corpus, finished
):
  _, workdir = finished
  before = sorted(workdir.rglob("*"))
  with pytest.raises(ConfigError, match=r"loss.beta: None there, 0.3 here"):
    train(small_config(corpus, **{"loss.beta": 0.3}), workdir)
  assert sorted(workdir.rglob("*")) == before


def test_a_file_in_place_of_the_work_directory_is_refused(corpus, tmp_path):
  (tmp_path / "taken").write_text("mine")
  with pytest.raises(ConfigError, match="taken"):
    train(small_config(corpus), tmp_path / "taken")
  assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_with_a_config_of_something_else_is_refused(corpus, tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(ConfigError, match="not of a run"):
    train(small_config(corpus), tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_changed_data_is_not_continued(corpus, tmp_path, monkeypatch):
  source = tmp_path / "pairs.jsonl"
  source.write_text(corpus["pairs"].read_text())
  config = small_config({"pairs": source})
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Stopped):
      train(config, tmp_path / "run")
  lines = source.read_text().splitlines()
  source.write_text("\n".join(lines[1:]) + "\n")
  with pytest.raises(CheckpointError, match="another data"):
    train(config, tmp_path / "run")


def test_a_checkpoint_of_another_shape_is_refused(corpus, finished, tmp_path):
  _, workdir = finished
  wider = Run(small_config(corpus, **{"model.ffn": 48}))
  with (
    checkpoint.Checkpoints(workdir / "checkpoints") as saved,
    pytest.raises(CheckpointError, match=r"\[2, 16, 32\].*\[2, 16, 48\]"),
  ):
    saved.restore(STEPS, wider.abstract_state)


def test_a_damaged_checkpoint_is_named(corpus, finished, tmp_path):
  copy = shutil.copytree(finished[1] / "checkpoints", tmp_path / "copy")
  files = [p for p in (copy / str(STEPS)).rglob("d/*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  run = Run(small_config(corpus))
  with (
    checkpoint.Checkpoints(copy) as saved,
    pytest.raises(stored.DamagedError, match=f"{STEPS}: cannot be"),
  ):
    saved.restore(STEPS, run.abstract_state)


@pytest.mark.slow
def test_answers_before_are_those_of_step_0_also_where_they_were_lost(
  corpus, finished, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[1], workdir)
  for name in ("samples.jsonl", "summary.json"):
    (workdir / name).unlink()
  first, states = Run.start, []

  def start(run):
    state, frozen = first(run)
    states.append(weakref.ref(jax.tree.leaves(state.opt_state)[-1]))
    return state, frozen

  def restore(saved, step, abstract, real=checkpoint.Checkpoints.restore):
    assert states[0]() is None, "two states at a time"
    return real(saved, step, abstract)

  monkeypatch.setattr(Run, "start", start)
  monkeypatch.setattr(checkpoint.Checkpoints, "restore", restore)
  train(small_config(corpus), workdir)
  ours, whole = (d / "samples.jsonl" for d in (workdir, finished[1]))
  assert ours.read_text() == whole.read_text()


def test_saving_a_step_twice_is_an_error_and_not_silence(finished, corpus):
  _, workdir = finished
  run = Run(small_config(corpus))
  with (
    checkpoint.Checkpoints(workdir / "checkpoints") as saved,
    pytest.raises(CheckpointError, match="not saved"),
  ):
    saved.save(STEPS, run.start()[0], {})


# What a run carries on beside parameters and optimizer.
CARRIED = {
  "a running mean": {"loss.name": "bco"},
  "a moving reference": {
    "reference.sync_every": 2,
    "reference.sync_mixup": 0.5,
  },
  "two counts of one mean": {
    "loss.name": "dpo+0.5*sft",
    "loss.ld_alpha": 0.5,
    "loss.wpo": True,
  },
  "parts of a batch": {"loss.name": "kto", "train.microbatches": 2},
  # 36 pairs in batches of 12: it is stopped where an epoch ends.
  "an epoch": {"train.batch_size": 12, "data.eval_rows": 12},
}


@pytest.mark.slow
@pytest.mark.parametrize("carried", CARRIED)
def test_a_run_is_continued_with_all_that_it_carries(
  corpus, tmp_path, monkeypatch, carried
):
  config = small_config(corpus, **CARRIED[carried], **{"sample.prompts": 0})
  train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Stopped):
      train(config, tmp_path / "parts")
  train(config, tmp_path / "parts")
  assert metric_rows(tmp_path / "parts") == metric_rows(tmp_path / "whole")
  for folder in ("whole", "parts"):
    assert (tmp_path / folder / "model").is_dir()
  ours, whole = (
    (tmp_path / folder / "model" / "model.safetensors").read_bytes()
    for folder in ("parts", "whole")
  )
  assert ours == whole


def test_a_reference_that_is_copied_each_step_keeps_the_margin_at_0(
  corpus, tmp_path
):
  config = small_config(
    corpus, **{"reference.sync_every": 1, "reference.sync_mixup": 1.0}
  )
  summary = train(config, tmp_path / "run")
  assert summary["final_eval"]["rewards/margins"] == 0.0
  # Against what it started from it has moved all the same.
  assert abs(summary["kl_to_reference"]) > 1e-3


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"loss.name": "reward"}, ["sample.prompts=2", "reward model"]),
    (
      {"loss.name": "orpo", "reference.sync_every": 2},
      ["sync_every", "'orpo' reads no reference"],
    ),
    (
      {"reference.precompute": True, "reference.sync_every": 2},
      ["sync_every", "precompute"],
    ),
    (
      {"loss.name": "kto", "reference.precompute": True},
      ["'kto'", "mismatched"],
    ),
    ({"loss.name": "tpo"}, ["kind 'ranked' takes ranked"]),
    ({"reference.sync_mixup": 1.5}, ["reference.sync_mixup=1.5", "[0, 1]"]),
  ],
)
def test_settings_without_a_meaning_are_refused(corpus, changes, words):
  with pytest.raises(UserError) as error:
    Run(small_config(corpus, **changes))
  assert all(word in str(error.value) for word in words), str(error.value)
  assert "\n" not in str(error.value)


def test_three_ranked_responses_are_asked_for_where_they_are_needed(
  corpus, tmp_path
):
  two = tmp_path / "two.jsonl"
  rows = map(json.loads, corpus["rankings"].read_text().splitlines())
  two.write_text(
    "".join(
      json.dumps(row | {"responses": row["responses"][:2]}) + "\n"
      for row in rows
    )
  )
  changes = {"data.source": str(two), "data.eval_rows": 4}
  with pytest.raises(UserError, match="row 0 has 2 responses to rank"):
    Run(small_config(corpus, **changes, **{"loss.name": "tpo"}))
  Run(small_config(corpus, **changes, **{"loss.name": "plackett_luce"}))


@pytest.mark.parametrize(
  "loss",
  [
    pytest.param({"loss.ld_alpha": 0.3}, marks=pytest.mark.slow, id="tails"),
    pytest.param({"loss.name": "bco"}, id="labels"),
  ],
)
def test_a_known_reference_serves_other_losses_too(corpus, tmp_path, loss):
  changes = {"sample.prompts": 0, "train.export": False} | loss
  results = {}
  for known in (False, True):
    config = small_config(corpus, **changes, **{"reference.precompute": known})
    results[known] = train(config, tmp_path / str(known))["final_eval"]
  assert results[True]["loss"] == pytest.approx(
    results[False]["loss"], rel=1e-5
  )


TRAINED = [
  "sft", "ipo", "kto", "orpo", "bco", "aot", "plackett_luce", "tpo",
  "dpo+0.3*sft",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("loss", TRAINED)
def test_every_kind_of_loss_trains_from_the_same_config(corpus, tmp_path, loss):
  ranked = loss in ("plackett_luce", "tpo")
  kind = "sft" if loss == "sft" else "rankings" if ranked else "pairs"
  source = str(corpus[kind])
  changes = {
    "data.source": source,
    "train.steps": 16,
    "train.eval_every": 0,
    "optim.learning_rate": 3e-3,
    "sample.prompts": 0,
    "data.eval_source": source,  # what it was trained on must get better
    "data.eval_split": "train",
    "data.eval_rows": 24,
  }
  if loss == "sft":
    config = small_config(corpus, "sft", **changes)
  else:
    config = small_config(corpus, "dpo", **changes, **{"loss.name": loss})
  summary = train(config, tmp_path / "run")
  first, last = summary["initial_eval"], summary["final_eval"]
  assert last["loss"] < first["loss"]
  if loss not in ("sft", "orpo", "tpo"):
    assert last["rewards/margins"] > first["rewards/margins"]


def test_orpo_and_sft_load_no_reference(corpus):
  for loss in ("orpo", "sft"):
    untouchable = object()
    assert (
      Run(small_config(corpus, loss)).load_reference(untouchable, {}) is None
    )


def test_a_precomputed_reference_gives_the_same_run(corpus, finished, tmp_path):
  config = small_config(corpus)
  config = dataclasses.replace(
    config, reference=dataclasses.replace(config.reference, precompute=True)
  )
  train(config, tmp_path / "run")
  for ours, whole in zip(
    metric_rows(tmp_path / "run"), metric_rows(finished[1]), strict=True
  ):
    np.testing.assert_allclose(ours["loss"], whole["loss"], rtol=1e-5)


def test_an_attempt_without_a_checkpoint_does_not_block_its_directory(
  corpus, tmp_path, monkeypatch
):
  def fail(*_):
    raise RuntimeError("out of memory")

  with monkeypatch.context() as patch:
    patch.setattr(train_module._Training, "_loop", fail)
    with pytest.raises(RuntimeError):
      train(small_config(corpus, **{"loss.beta": 0.3}), tmp_path / "run")
  train(small_config(corpus), tmp_path / "run")
  assert len(metric_rows(tmp_path / "run")) == 6


def test_a_reference_that_was_retrained_is_not_continued_with(
  corpus, finished, tmp_path, monkeypatch
):
  start = tmp_path / "start"
  shutil.copytree(finished[1] / "model", start)
  config = small_config(corpus, **{"model.path": str(start)})
  with monkeypatch.context() as patch:
    stop_after(patch, 2)
    with pytest.raises(Stopped):
      train(config, tmp_path / "run")
  weights = start / "model.safetensors"
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(bytes(data))
  with pytest.raises(CheckpointError, match="another reference"):
    train(config, tmp_path / "run")


def test_a_reference_of_another_config_is_refused(corpus, finished, tmp_path):
  model = finished[1] / "model"
  other = tmp_path / "other"
  shutil.copytree(model, other)
  shape = json.loads((other / "config.json").read_text())
  shape["rope_theta"] = 5e5
  (other / "config.json").write_text(json.dumps(shape))
  config = small_config(
    corpus, **{"model.path": str(model), "reference.path": str(other)}
  )
  run = Run(config)
  with pytest.raises(CheckpointError, match="another config"):
    run.load_reference(None, {})


def test_a_metric_that_is_not_there_is_refused_before_steps_are_lost(
  corpus, tmp_path, monkeypatch
):
  monkeypatch.setattr(train_module, "_batches", pytest.fail)
  typo = {"train.keep_best": "min losss", "sample.prompts": 0}
  with pytest.raises(ConfigError, match="no metric 'losss'"):
    train(small_config(corpus, **typo), tmp_path / "run")
  nothing = {"train.keep_best": "min loss", "data.eval_rows": 0}
  with pytest.raises(ConfigError, match="needs held-out data"):
    train(small_config(corpus, **nothing), tmp_path / "other")


def test_a_signal_while_restoring_damages_nothing(
  corpus, finished, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[1], workdir)
  (workdir / "summary.json").unlink()

  def read(*_):
    signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(stored, "_read_whole", read)
    with pytest.raises(Stopped):
      train(small_config(corpus), workdir)
  assert stored.saved_steps(workdir / "checkpoints") == [4, 6]
  assert train(small_config(corpus), workdir)["steps"] == STEPS


def test_a_line_that_was_cut_does_not_block_a_run(corpus, finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[1], workdir)
  (workdir / "summary.json").unlink()
  (workdir / "skipped.jsonl").write_text('{"step": 2, "rows": [1]}\n{"step": ')
  train(small_config(corpus), workdir)
  assert (workdir / "skipped.jsonl").read_text() == (
    '{"step": 2, "rows": [1]}\n'
  )


def test_other_prompts_are_answered_anew(corpus, finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[1], workdir)
  (workdir / "summary.json").unlink()
  config = small_config(corpus, **{"sample.prompts": 3})
  train(config, workdir, allow=["sample.prompts"])
  lines = (workdir / "samples.jsonl").read_text().splitlines()
  assert len(lines) == 3 and all("after" in json.loads(x) for x in lines)


def test_an_interrupted_first_save_does_not_block_its_directory(
  corpus, tmp_path
):
  config = small_config(corpus, **{"loss.beta": 0.3})
  place = Workdir(tmp_path / "run")
  with place.claimed(config):
    (place.checkpoints / "2.orbax-checkpoint-tmp").mkdir(parents=True)
  place.check(small_config(corpus))
  (place.checkpoints / "2").mkdir()
  with pytest.raises(ConfigError, match="another run"):
    place.check(small_config(corpus))
