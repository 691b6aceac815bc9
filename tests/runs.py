"""What tests of whole runs share: a small model on the generated corpus, a
signal at a step, and programs that are compiled once."""

import os
import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax import train as train_module
from dpo_jax.build import build
from dpo_jax.config import from_dict
from dpo_jax.config_file import defaults
from dpo_jax.metrics import CLOCKED
from dpo_jax.models import hf
from dpo_jax.weights import load_variables
from dpo_jax.writers import read_metrics

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
  """Most runs here compile the same programs, in all modules and processes of
  one run of the tests."""
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  options = {
    "jax_compilation_cache_dir": str(folder / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def small_config(corpus, loss="dpo", **changes):
  config = defaults(loss=loss)
  config.model.tokenizer = "bytes"
  config.model.width = 16
  config.model.layers = 2
  config.model.heads = 2
  config.model.kv_heads = 1
  config.model.ffn = 32
  config.data.source = str(corpus["sft" if loss == "sft" else "pairs"])
  config.data.eval_rows = 10
  config.data.cache_dir = ""
  config.data.row_length = 512  # one row a batch: one shape to compile
  config.optim.learning_rate = 1e-2
  config.train.batch_size = 4
  config.train.steps = STEPS
  config.train.log_every = 2
  config.train.eval_every = 3
  config.train.checkpoint_every = 2
  config.sample.prompts = 2
  config.sample.max_tokens = 4
  config.update_from_flattened_dict(changes)
  return from_dict(config.to_dict())


def metric_rows(workdir):
  """Metrics rows without what depends on the clock."""
  return [
    {k: v for k, v in row.items() if k not in CLOCKED}
    for row in read_metrics(workdir / "metrics.jsonl")
  ]


def stop_after(monkeypatch, stop):
  """Sends SIGTERM to this process when the given step is about to run."""
  real = train_module._batches

  def batches(run, start):
    for step, batch in real(run, start):
      if step == stop:
        signal.raise_signal(signal.SIGTERM)
      yield step, batch

  monkeypatch.setattr(train_module, "_batches", batches)


def save_base(corpus, path):
  """A random model to start from, as a Hugging Face folder."""
  config = small_config(corpus)
  built = build(config)
  hf.save_checkpoint(
    path,
    built.family,
    built.model.config,
    load_variables(config, built),
    save_tokenizer=built.tokenizer.save,
  )
  return str(path)


def on_base(corpus, base, **changes):
  """The settings of a run that starts from that."""
  changes = {"model.path": base, "model.tokenizer": ""} | changes
  return small_config(corpus, **changes)
