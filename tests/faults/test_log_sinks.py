"""TensorBoard and W&B absent, offline or raising: the run goes on and
metrics.jsonl has every row."""

import logging
import sys
import types

import pytest
from runs import compile_once, metric_rows, small_config  # noqa: F401

from dpo_jax.data.corpus import write_corpus
from dpo_jax.train import train
from dpo_jax.writers import MetricsWriter, read_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly")


class Offline(Exception):
  """As wandb's CommError: not an OSError."""


def failing_wandb(where):
  """A wandb that fails in one of its functions."""

  def fail(*args, **kwargs):
    raise Offline("network is unreachable")

  class Run:
    define_metric = staticmethod(
      fail if where == "define_metric" else lambda *a, **k: None
    )
    log = staticmethod(fail if where == "log" else lambda row: None)
    finish = staticmethod(fail if where == "finish" else lambda: None)

  fake = types.ModuleType("wandb")
  fake.init = fail if where == "init" else lambda **k: Run()
  return fake


@pytest.mark.parametrize("where", ["init", "define_metric", "log", "finish"])
def test_a_raising_wandb_warns_once_and_rows_are_complete(
  tmp_path, monkeypatch, caplog, where
):
  monkeypatch.setitem(sys.modules, "wandb", failing_wandb(where))
  with (
    caplog.at_level(logging.WARNING),
    MetricsWriter(tmp_path, wandb=True) as writer,
  ):
    for step in range(5):
      writer.write(step, "train", {"loss": 1.0})
  (record,) = caplog.records
  assert "wandb is off" in record.getMessage()
  assert "network is unreachable" in record.getMessage()
  assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_a_run_goes_on_to_its_report_without_any_sink(
  tmp_path, monkeypatch, caplog
):
  corpus = write_corpus(tmp_path / "corpus", pairs=30)
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  monkeypatch.setitem(sys.modules, "wandb", failing_wandb("log"))
  changes = {"log.tensorboard": True, "log.wandb": True, "sample.prompts": 0}
  with caplog.at_level(logging.WARNING):
    summary = train(small_config(corpus, **changes), tmp_path / "run")
  warned = [r.getMessage().split()[0] for r in caplog.records]
  assert sorted(warned) == ["tensorboard", "wandb"]
  rows = [(r["step"], r["split"]) for r in metric_rows(tmp_path / "run")]
  assert sorted(rows) == [
    (0, "eval"), (2, "train"), (3, "eval"), (4, "train"), (6, "eval"),
    (6, "train"),
  ]  # fmt: skip
  assert summary["steps"] == 6
  assert (tmp_path / "run" / "report.html").exists()
