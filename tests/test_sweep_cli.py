"""scripts/sweep.py: what it prints, its exit status, and what it refuses."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = """
from dpo_jax import sweep
from dpo_jax.config_file import defaults, parse_arg

def get_config(arg=None):
  arg = parse_arg(arg, steps=3)
  config = defaults(loss="dpo")
  config.data.source = {source!r}
  config.data.cache_dir = ""
  config.model.tokenizer = "bytes"
  config.model.width = 8
  config.model.layers = 1
  config.model.heads = 1
  config.model.kv_heads = 1
  config.model.ffn = 8
  config.train.steps = arg.steps
  config.train.batch_size = 2
  config.train.export = False
  config.sample.prompts = 0
  return config

def get_sweep():
  return sweep.listed("loss.beta", 0.1, 0.3)

def wrong():
  return [{{"loss.betta": 1.0}}, {{"seed": "one"}}]
"""
PAIR = {"prompt": "Hi", "chosen": " you", "rejected": " there"}


def run(*argv, status=0):
  environment = os.environ | {
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    "JAX_PLATFORMS": "cpu",
  }
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  done = subprocess.run(
    [sys.executable, *map(str, argv)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environment,
  )
  assert done.returncode == status, done.stderr[-3000:]
  assert "Traceback" not in done.stderr
  return done.stdout if status == 0 else done.stdout + done.stderr


@pytest.fixture
def config(tmp_path):
  source = tmp_path / "pairs.jsonl"
  source.write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
  path = tmp_path / "config.py"
  path.write_text(CONFIG.format(source=str(source)))
  return path


def test_a_dry_run_prints_the_command_of_each_run_and_makes_nothing(
  config, tmp_path
):
  out = run(
    "scripts/sweep.py", f"--config={config}:steps=5", "--dry_run",
    "--config.optim.learning_rate=0.01", f"--workdir={tmp_path / 's'}",
    "--gpus=2,3",
  )  # fmt: skip
  first, command, second, other = out.splitlines()
  assert first.startswith("# beta=0.1-") and first.endswith(": never started")
  assert second.startswith("# beta=0.3-")
  name = first.removeprefix("# ").partition(":")[0]
  place = tmp_path / "s"
  assert command == (
    f"DPO_JAX_PROCESSES=1 JAX_COMPILATION_CACHE_DIR={place}/cache/programs"
    " CUDA_VISIBLE_DEVICES=2"
    f" {sys.executable} scripts/train.py --config={config}:steps=5"
    f" --config.optim.learning_rate=0.01 --config.data.cache_dir={place}/cache"
    f" --config.loss.beta=0.1 --workdir={place}/runs/{name}"
  )
  assert "CUDA_VISIBLE_DEVICES=3" in other
  assert not place.exists()


def test_a_sweep_trains_its_runs_and_ends_with_one_table(config, tmp_path):
  """And the commands that a dry run prints are those that it ran."""
  place = tmp_path / "s"
  common = ("scripts/sweep.py", f"--config={config}", f"--workdir={place}")
  out = run(*common, "--config.model.dtype=float32")
  assert out.count("| done |") == 2
  with open(place / "table.csv") as file:
    rows = list(csv.DictReader(file))
  assert [row["loss.beta"] for row in rows] == ["0.1", "0.3"]
  assert {row["steps"] for row in rows} == {"3"}
  for row in rows:
    saved = json.loads(
      (place / "runs" / row["run"] / "config.json").read_text()
    )
    assert saved["config"]["loss"]["beta"] == float(row["loss.beta"])
    log = (place / "runs" / row["run"] / "log.txt").read_text()
    assert log.startswith("$ DPO_JAX_PROCESSES=1 JAX_COMPILATION_CACHE_DIR=")
  assert out == run(*common, "--table")


def test_a_run_that_fails_is_status_1_and_the_table_says_so(config, tmp_path):
  out = run(
    "scripts/sweep.py", f"--config={config}", f"--workdir={tmp_path / 's'}",
    "--config.data.source=missing.jsonl", status=1,
  )  # fmt: skip
  assert out.count("| failed |") == 2
  assert "failed with status 2: error: missing.jsonl" in out


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    ([], "name a directory for all runs"),
    (["--workdir=x", "--sweep=none"], "no function 'none'"),
    (["--workdir=x", "--jobs=-1"], "--jobs=-1 should be at least 1"),
    (["--workdir=x", "--sweep=wrong"], "did you mean 'loss.beta'?"),
    (["--workdir=x", "--sweep=wrong"], "run 2 (seed=one)"),
  ],
)
def test_what_is_wrong_is_one_line_and_starts_nothing(config, flags, told):
  err = run("scripts/sweep.py", f"--config={config}", *flags, status=2)
  assert told in err
  assert err.count("\n") == 1
