"""How a run ends, and what its directory says when it is started again."""

import json
import logging
import shutil

import pytest
from runs import (  # noqa: F401
  STEPS,
  compile_once,
  metric_rows,
  small_config,
  stop_after,
)

from dpo_jax import finish as finish_module
from dpo_jax import processes
from dpo_jax import train as train_module
from dpo_jax.data.corpus import write_corpus
from dpo_jax.dry_run import render_summary
from dpo_jax.errors import DataError, UserError
from dpo_jax.models import hf
from dpo_jax.stored import saved_steps
from dpo_jax.train import Stopped, train
from dpo_jax.workdir import Workdir
from dpo_jax.writers import read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished") / "run"
  train(small_config(corpus), workdir)
  return workdir


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / "run")


def full(*_, **__):
  raise OSError(28, "No space left on device")


def test_a_summary_is_the_sign_that_all_else_is_there(
  corpus, copy, monkeypatch
):
  def stopped(*_):
    raise Stopped("SIGTERM")

  for name in ("summary.json", "report.html"):
    (copy / name).unlink()
  with monkeypatch.context() as patch:
    patch.setattr(finish_module, "write_report", stopped)
    with pytest.raises(Stopped):
      train(small_config(corpus), copy)
  assert not (copy / "summary.json").exists()
  train(small_config(corpus), copy)
  assert "DPO" in (copy / "report.html").read_text()
  assert (copy / "summary.json").exists()


def test_a_finished_run_without_its_report_gets_one(
  corpus, finished, copy, monkeypatch
):
  (copy / "report.html").unlink()
  monkeypatch.setattr(train_module, "finish", pytest.fail)
  train(small_config(corpus), copy)
  ours, whole = ((d / "report.html").read_bytes() for d in (copy, finished))
  assert ours == whole


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(
  corpus, copy, monkeypatch
):
  shutil.rmtree(copy / "checkpoints")
  monkeypatch.setattr(train_module._Training, "_loop", pytest.fail)
  assert train(small_config(corpus), copy)["steps"] == STEPS
  assert len(metric_rows(copy)) == 6


def test_a_finished_run_is_told_also_where_a_number_is_not_finite(finished):
  summary = json.loads((finished / "summary.json").read_text())
  summary["final_eval"]["loss"] = "nan"
  assert "0.6931 -> nan" in render_summary(summary)


@pytest.mark.parametrize("what", ["report.html", "model"])
def test_a_disk_that_is_full_at_the_end_is_one_sentence(
  corpus, copy, monkeypatch, what
):
  for name in ("summary.json", "report.html"):
    (copy / name).unlink()
  if what == "model":
    monkeypatch.setattr(hf, "save_checkpoint", full)
  else:
    monkeypatch.setattr("dpo_jax.report.page.write_whole", refuse)
  with pytest.raises(DataError, match=f"{what}: cannot be written: No space"):
    train(small_config(corpus), copy)


def refuse(path, content):
  raise DataError(f"{path}: cannot be written: No space left on device")


def test_the_first_process_alone_reads_the_work_directory(
  corpus, copy, monkeypatch
):
  leading = []

  def lead(decide):
    leading.append(decide)
    try:
      return decide()
    finally:
      leading.pop()

  def watch(owner, name):
    real, seen = getattr(owner, name), []

    def read(*args):
      seen.append(bool(leading))
      return real(*args)

    monkeypatch.setattr(owner, name, read)
    return seen

  monkeypatch.setattr(processes, "lead", lead)
  seen = {
    name: watch(owner, name)
    for owner, name in (
      (Workdir, "read_samples"),
      (Workdir, "read_summary"),
      (train_module, "read_metrics"),
    )
  } | {"at the end": watch(finish_module, "read_metrics")}
  (copy / "summary.json").unlink()
  train(small_config(corpus), copy)
  train(small_config(corpus), copy)
  assert all(seen.values()) and all(map(all, seen.values())), seen


@pytest.mark.slow
def test_an_attempt_without_a_checkpoint_leaves_nothing_to_the_next(
  corpus, tmp_path, monkeypatch
):
  """Its data may have been mended since, under the same name."""
  source = tmp_path / "pairs.jsonl"
  lines = corpus["pairs"].read_text().splitlines()
  source.write_text("\n".join(lines[6:]) + "\n")
  workdir = tmp_path / "run"
  config = small_config({"pairs": source}, **{"train.checkpoint_every": 0})

  def killed(*_):
    raise RuntimeError("killed")

  with monkeypatch.context() as patch:
    patch.setattr(train_module._Training, "_save", killed)
    with pytest.raises(RuntimeError):
      train(config, workdir)
  assert len(metric_rows(workdir)) == 6
  (workdir / "wandb_id.txt").write_text("0123\n")
  (workdir / "tensorboard").mkdir()
  (workdir / "tensorboard" / "events").write_text("of the first attempt")
  source.write_text("\n".join(lines) + "\n")
  train(config, workdir)
  assert not (workdir / "wandb_id.txt").exists()
  assert not (workdir / "tensorboard").exists()
  train(config, tmp_path / "other")
  assert metric_rows(workdir) == metric_rows(tmp_path / "other")


@pytest.mark.slow
def test_a_stopped_run_keeps_its_curves(corpus, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Stopped):
      train(small_config(corpus), workdir)
  (workdir / "wandb_id.txt").write_text("0123\n")
  train(small_config(corpus), workdir)
  assert (workdir / "wandb_id.txt").read_text() == "0123\n"
  steps = [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]
  assert steps == [0, 2, 3, 4, 6, 6]


@pytest.mark.parametrize(
  ("every", "words"),
  [(0, "no checkpoint to continue from"), (1, "step 1 is there to continue")],
)
def test_a_run_that_diverges_says_what_there_is_to_continue_from(
  corpus, tmp_path, monkeypatch, caplog, every, words
):
  monkeypatch.setattr(logging.getLogger("dpo_jax"), "propagate", True)
  config = small_config(
    corpus, **{"loss.beta": 1e38, "train.max_skipped": 2,
               "train.checkpoint_every": every, "sample.prompts": 0}
  )  # fmt: skip
  with pytest.raises(UserError, match=f"2 steps in a row.*{words}"):
    train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_step_that_was_evaluated_after_it_was_saved_may_be_the_best(
  corpus, tmp_path, monkeypatch
):
  config = small_config(
    corpus, **{"train.keep_best": "max loss", "train.keep_checkpoints": 1,
               "sample.prompts": 0, "train.export": False}
  )  # fmt: skip
  train(config, tmp_path / "whole")
  for stop in (3, 5):  # the first leaves evaluation to who continues it
    with monkeypatch.context() as patch:
      stop_after(patch, stop)
      with pytest.raises(Stopped):
        train(config, tmp_path / "parts")
  train(config, tmp_path / "parts")
  for folder in ("whole", "parts"):
    assert saved_steps(tmp_path / folder / "checkpoints") == [3, 6]
