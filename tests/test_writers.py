"""metrics.jsonl stays complete and strict JSON, whatever else fails."""

import json
import logging
import math
import sys
import types

import pytest

from dpo_jax.errors import DataError
from dpo_jax.writers import MetricsWriter, read_metrics


def strict_rows(path):
  def refuse(word):
    raise AssertionError(f"{word} is not JSON")

  lines = path.read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


def write_steps(directory, steps, **kwargs):
  with MetricsWriter(directory, **kwargs) as writer:
    for step in steps:
      writer.write(step, "train", {"loss": step / 8})


def test_rows_come_back_as_they_were_written(tmp_path):
  with MetricsWriter(tmp_path / "new" / "run") as writer:
    writer.write(1, "train", {"loss": 0.6931471805599453, "kl": 2})
    writer.write(1, "eval", {"rewards/accuracies": 0.5})
  assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [
    {"step": 1, "split": "train", "loss": 0.6931471805599453, "kl": 2.0},
    {"step": 1, "split": "eval", "rewards/accuracies": 0.5},
  ]


def test_non_finite_values_are_strings_in_the_file_and_floats_when_read(
  tmp_path,
):
  with MetricsWriter(tmp_path) as writer:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}
    writer.write(3, "train", values)
  (row,) = strict_rows(tmp_path / "metrics.jsonl")
  assert (row["a"], row["b"], row["c"]) == ("nan", "inf", "-inf")
  (row,) = read_metrics(tmp_path / "metrics.jsonl")
  assert math.isnan(row["a"])
  assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1.0)


def test_each_row_is_on_disk_before_the_writer_is_closed(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, "train", {"loss": 1.0})
  assert len(read_metrics(writer.path)) == 1
  writer.close()
  writer.close()


def test_resume_drops_rows_after_the_resumed_step(tmp_path):
  write_steps(tmp_path, range(1, 8))
  write_steps(tmp_path, [5, 6], resume_step=4)
  steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
  assert steps == [1, 2, 3, 4, 5, 6]
  assert not list(tmp_path.glob("*.part"))


def test_rows_are_kept_when_nothing_is_resumed(tmp_path):
  write_steps(tmp_path, [1, 2])
  write_steps(tmp_path, [3])
  steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
  assert steps == [1, 2, 3]


@pytest.mark.parametrize("resume_step", [None, 2])
def test_a_line_cut_by_a_kill_is_dropped_and_the_next_row_is_whole(
  tmp_path, resume_step
):
  write_steps(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 3, "split": "tr')
  assert [row["step"] for row in read_metrics(path)] == [1, 2]
  write_steps(tmp_path, [3], resume_step=resume_step)
  assert [row["step"] for row in strict_rows(path)] == [1, 2, 3]


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "split": "train"}')
  write_steps(tmp_path, [2])
  assert [row["step"] for row in strict_rows(path)] == [1, 2]


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
  write_steps(tmp_path, [1, 2, 3])
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def fail(descriptor):
    raise OSError("disk full")

  monkeypatch.setattr("os.fsync", fail)
  with pytest.raises(DataError, match=r"metrics.jsonl: .*: disk full"):
    MetricsWriter(tmp_path, resume_step=1)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_damage_in_the_middle_names_the_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
  with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
    read_metrics(path)
  write_steps(tmp_path, [3])
  assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_missing_file_is_one_clear_error(tmp_path):
  with pytest.raises(DataError, match="no such metrics file"):
    read_metrics(tmp_path / "metrics.jsonl")


def test_unknown_splits_and_reserved_names_are_refused(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match="split"):
      writer.write(1, "test", {})
    with pytest.raises(ValueError, match="reserved"):
      writer.write(1, "train", {"step": 2.0})
  assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
  ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_warns_once_and_rows_are_complete(
  tmp_path, monkeypatch, caplog, name, package
):
  monkeypatch.setitem(sys.modules, package, None)
  with caplog.at_level(logging.WARNING):
    write_steps(tmp_path, range(3), **{name: True})
  (record,) = caplog.records
  assert f"dpo-jax[{name}]" in record.getMessage()
  assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("fails_in", ["__init__", "add_scalar", "close"])
def test_a_raising_tensorboard_warns_once_and_rows_are_complete(
  tmp_path, monkeypatch, caplog, fails_in
):
  def fail(*args, **kwargs):
    raise RuntimeError("no space left")

  members = {
    "__init__": lambda self, *args, **kwargs: None,
    "add_scalar": lambda self, *args: None,
    "close": lambda self: None,
    fails_in: fail,
  }
  fake = types.ModuleType("tensorboardX")
  fake.SummaryWriter = type("SummaryWriter", (), members)
  monkeypatch.setitem(sys.modules, "tensorboardX", fake)
  with caplog.at_level(logging.WARNING):
    write_steps(tmp_path, range(5), tensorboard=True)
  (record,) = caplog.records
  assert "no space left" in record.getMessage()
  assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_tensorboard_writes_event_files(tmp_path):
  pytest.importorskip("tensorboardX")
  write_steps(tmp_path, range(3), tensorboard=True)
  (events,) = (tmp_path / "tensorboard").glob("events*")
  assert b"train/loss" in events.read_bytes()


def test_a_resumed_wandb_run_keeps_its_id_and_its_step_axis(
  tmp_path, monkeypatch
):
  rows, ids = [], []

  class Run:
    define_metric = staticmethod(lambda *args, **kwargs: None)
    log = staticmethod(rows.append)
    finish = staticmethod(lambda: None)

  fake = types.ModuleType("wandb")
  fake.init = lambda **kwargs: ids.append(kwargs["id"]) or Run()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  write_steps(tmp_path, [1, 2, 3], wandb=True)
  write_steps(tmp_path, [2], wandb=True, resume_step=1)
  assert ids[0] == ids[1]
  assert [row["step"] for row in rows] == [1, 2, 3, 2]
  assert rows[-1] == {"step": 2, "train/loss": 0.25}


def test_a_row_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
  class Full:
    def write(self, text):
      raise OSError(28, "No space left on device")

    def close(self):
      self.write("what is buffered")

  writer = MetricsWriter(tmp_path)
  writer._file.close()
  monkeypatch.setattr(writer, "_file", Full())
  with pytest.raises(DataError, match=r"metrics.jsonl: .*No space left"):
    writer.write(1, "train", {"loss": 1.0})
  writer.close()


def test_a_disk_that_takes_no_file_is_one_sentence(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("pathlib.Path.open", full)
  with pytest.raises(DataError, match=r"metrics.jsonl: .*No space left"):
    MetricsWriter(tmp_path)
