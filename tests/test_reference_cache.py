"""Scores of the reference on disk: when they are used, and when not."""

import json
import logging
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (  # noqa: F401
  compile_once,
  metric_rows,
  on_base,
  save_base,
  small_config,
)

from dpo_jax import evaluate, reference_cache
from dpo_jax.batch import Scores
from dpo_jax.data import cache
from dpo_jax.data.corpus import write_corpus
from dpo_jax.run import Run
from dpo_jax.train import train

SCORES = Scores(
  np.arange(6, dtype=np.float32).reshape(3, 2),
  np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=30)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
  return save_base(corpus, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(autouse=True)
def listen(caplog):
  caplog.set_level(logging.INFO, "dpo_jax")


@pytest.fixture
def instant(monkeypatch):
  """Scores come out of nowhere, other ones each time."""
  rng = np.random.default_rng(0)

  def score(_, __, plan, *___, tails):
    shape = plan.examples.lengths.shape
    draw = lambda: rng.normal(size=shape).astype(np.float32)
    return Scores(draw(), draw() if tails else None)

  monkeypatch.setattr(evaluate, "score_examples", score)


def ready(config):
  """A run with its reference scored or found."""
  run = Run(config)
  state, frozen = run.start()
  run.precompute(run.load_reference(state.params, frozen))
  return run


def scored(caplog):
  """How many examples were scored so far, a number each time."""
  lines = [r.getMessage().split() for r in caplog.records]
  return [
    int(words[1])
    for words in lines
    if words[0] == "scoring" and words[2:] == ["examples", "under", "the",
                                              "reference"]
  ]  # fmt: skip


def entries(folder):
  return sorted(p.name for p in folder.glob("reference-*"))


def test_a_run_on_cached_scores_is_the_same_run_bit_for_bit(
  corpus, tmp_path, caplog
):
  changes = {"reference.precompute": True, "sample.prompts": 0}
  for name, folder in (("none", ""), ("fills", "c"), ("reads", "c")):
    where = str(tmp_path / folder) if folder else ""
    config = small_config(corpus, **changes, **{"data.cache_dir": where})
    train(config, tmp_path / name)
  assert scored(caplog) == [20, 20]  # 10 of 30 are held out
  weights = {
    (tmp_path / name / "model" / "model.safetensors").read_bytes()
    for name in ("none", "fills", "reads")
  }
  assert len(weights) == 1
  rows = [metric_rows(tmp_path / name) for name in ("none", "fills", "reads")]
  assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 6


def test_losses_and_their_settings_share_one_entry(
  corpus, tmp_path, caplog, instant
):
  where = tmp_path / "cache"
  known = []
  for change in (
    {},
    {"loss.beta": 0.7},
    {"loss.name": "ipo"},
    {"loss.ld_alpha": 0.5},
    {"loss.name": "dpo+0.1*sft"},
    {"optim.learning_rate": 3e-4},
    {"train.steps": 9},
    {"seed": 0},
  ):
    run = ready(
      small_config(corpus, **{"data.cache_dir": str(where)}, **change)
    )
    reference = run.train_plan.reference
    assert (reference.tails is not None) == run.loss.reads_tails
    known.append(reference.logps)
  assert scored(caplog) == [20] and len(entries(where)) == 1
  for logps in known:
    np.testing.assert_array_equal(logps, known[0])


def test_whatever_changes_the_scores_scores_again(
  corpus, base, tmp_path, caplog, instant
):
  where = {"data.cache_dir": str(tmp_path / "cache")}
  for change in (
    {},
    {"seed": 1},
    {"model.dtype": "bfloat16"},
    {"model.param_dtype": "bfloat16"},
    {"model.attention": "dense"},
    {"model.head_tile": 64},
    {"data.max_length": 200},
    {"data.eval_rows": 9},
    {"data.row_length": 640},
    {"train.batch_size": 5},
    {"model.width": 32},
  ):
    before = len(scored(caplog))
    ready(small_config(corpus, **where, **change))
    assert len(scored(caplog)) == before + 1, change
  n = len(scored(caplog))
  assert len(entries(tmp_path / "cache")) == n
  # The same weights, read from a folder, are the same.
  ready(on_base(corpus, base, **where, seed=4))
  assert len(scored(caplog)) == n


@pytest.mark.parametrize("quantize", ["", "int8", "nf4"])
def test_a_base_below_adapters_is_told_apart_by_its_bits(
  corpus, base, tmp_path, caplog, instant, quantize
):
  if quantize:
    pytest.importorskip("qwix")
  where = {"data.cache_dir": str(tmp_path / "cache")}
  changes = {"lora.rank": 2}
  if quantize:
    changes |= {"model.quantize": quantize, "model.remat": "block"}
    ready(on_base(corpus, base, **where, **{"model.remat": "block"}))
  else:
    ready(on_base(corpus, base, **where))
  ready(on_base(corpus, base, **where, **changes))
  ready(on_base(corpus, base, **where, **changes, **{"lora.alpha": 4.0}))
  # New adapters add nothing, so the bare base is the reference.
  assert scored(caplog) == ([20, 20] if quantize else [20])


def test_any_bit_of_any_weight_is_part_of_the_fingerprint():
  x = np.random.default_rng(0).normal(size=(3, 50, 70)).astype(np.float32)
  seen = {reference_cache.fingerprint({"a": jnp.asarray(x)})}

  def new(tree):
    print_ = reference_cache.fingerprint(jax.tree.map(jnp.asarray, tree))
    fresh = print_ not in seen
    seen.add(print_)
    return fresh

  assert not new({"a": x})
  assert new({"b": x}) and new({"a": x.reshape(3, 70, 50)})
  assert new({"a": x.astype(jnp.bfloat16)})
  rng = np.random.default_rng(1)
  for _ in range(30):
    changed = x.copy()
    flat = changed.reshape(-1).view(np.uint32)
    flat[rng.integers(x.size)] ^= np.uint32(1) << np.uint32(rng.integers(32))
    assert new({"a": changed})
  swapped = x.copy()
  swapped[1, 20, [3, 4]] = x[1, 20, [4, 3]]
  assert new({"a": swapped}) and new({"a": np.roll(x, 1, axis=2)})
  small = np.zeros((4, 4), np.int8)
  assert new({"a": small}) and new({"a": small + np.eye(4, dtype=np.int8)})
  assert new({"a": jnp.zeros((4, 4), "int4")})


@pytest.mark.parametrize(
  "damage", ["flip", "cut", "remove", "report", "shape", "dtype", "pickle"]
)
def test_a_damaged_entry_is_rebuilt_with_one_warning(tmp_path, caplog, damage):
  folder = tmp_path / "cache"
  find = lambda: reference_cache.find_or_score(
    str(folder), "reference-a", (3, 2), lambda: SCORES
  )
  find()
  entry = folder / "reference-a"
  file = entry / "logps.npy"
  whole = file.read_bytes()
  if damage == "flip":
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  elif damage == "cut":
    file.write_bytes(whole[:-4])
  elif damage == "remove":
    file.unlink()
  elif damage == "report":
    (entry / "report.json").write_text("[" * 100_000)
  else:
    odd = {
      "shape": SCORES.logps[:2],
      "dtype": SCORES.logps.astype(np.float64),
      "pickle": np.array([{"a": 1}, None], dtype=object),
    }[damage]
    np.save(file, odd, allow_pickle=True)
    report = json.loads((entry / "report.json").read_text())
    report["files"]["logps"] = cache._checksum(file)
    (entry / "report.json").write_text(json.dumps(report))
  caplog.clear()
  for got, want in zip(find()[:2], SCORES[:2], strict=True):
    np.testing.assert_array_equal(got, want)
  warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
  assert len(warnings) == 1 and "damaged" in warnings[0].getMessage()
  assert scored(caplog) == [3]
  caplog.clear()
  find()
  assert not scored(caplog)
  assert [p.name for p in folder.iterdir()] == ["reference-a"]
  assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
  (tmp_path / "file").write_text("")
  got = reference_cache.find_or_score(
    str(tmp_path / "file" / "cache"), "reference-a", (3, 2), lambda: SCORES
  )
  assert got is SCORES
  warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
  assert len(warnings) == 1 and "cache not written" in caplog.text


_WORKER = """
import logging, pathlib, sys, time
import numpy as np
from dpo_jax import evaluate, reference_cache
from dpo_jax.batch import Scores
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
folder, seconds = sys.argv[1], float(sys.argv[2])
def score():
  (pathlib.Path(folder) / "begun").touch()
  time.sleep(seconds)
  return Scores(np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32))
got = reference_cache.find_or_score(folder, "reference-a", (3, 2), score)
print("sum", got.logps.sum())
"""


def worker(folder, seconds):
  return subprocess.Popen(
    [sys.executable, "-c", _WORKER, str(folder), str(seconds)],
    stdout=subprocess.PIPE,
    text=True,
  )


def wait_for(path):
  end = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_runs_that_want_the_same_at_a_time_score_it_once(tmp_path):
  first = worker(tmp_path, 8)
  wait_for(tmp_path / "begun")
  others = [worker(tmp_path, 8) for _ in range(2)]
  said = [p.communicate(timeout=90)[0] for p in (first, *others)]
  assert sum("scoring 3 examples" in text for text in said) == 1
  assert all("sum 6.0" in text for text in said)
  assert all("waiting for another run" in text for text in said[1:])
  (tmp_path / "begun").unlink()
  assert [p.name for p in tmp_path.iterdir()] == ["reference-a"]


def test_a_run_killed_while_it_scores_holds_nobody_up(tmp_path):
  first = worker(tmp_path, 60)
  wait_for(tmp_path / "begun")
  second = worker(tmp_path, 0)
  first.kill()
  said, _ = second.communicate(timeout=60)
  assert "scoring 3 examples" in said and "sum 6.0" in said
  first.communicate()
