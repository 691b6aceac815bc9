"""What each device would hold, by shapes and by the compiler."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from devices import ROOT, run_on_eight
from meshes import make_run, write_model

from dpo_jax import dry_run, memory
from dpo_jax.data.corpus import write_corpus

MESH = (2, 4, 1)
KINDS = {
  "all": {},
  "block": {"model.remat": "block"},
  "parts": {"model.remat": "block", "train.microbatches": 4},
  "lora": {"lora.rank": 4},
  "precomputed": {"reference.precompute": True},
  "moved": {"reference.precompute": True, "offload.reference": True},
}
MODEL = {"num_hidden_layers": 4, "vocab_size": 1024}


def measured(folder):
  """Of each kind: what is held, and what the compiler says is handed in."""
  out = {}
  for kind, changes in KINDS.items():
    run = make_run(folder, MESH, MODEL, **changes)
    compiled = memory.compile_step(run)
    given = compiled.memory_analysis().argument_size_in_bytes
    out[kind] = [memory.held(run, compiled), given]
  return out


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
  printed = run_on_eight(__file__, str(tmp_path_factory.mktemp("plans")))
  read = json.loads(printed.splitlines()[-1])
  return {kind: (memory.Held(*x), given) for kind, (x, given) in read.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_tell_what_the_compiler_counts(on_eight, kind):
  held, given = on_eight[kind]
  by_shapes = held.total - held.temporary
  if kind == "lora":  # the base is handed in twice, and there once
    by_shapes += held.frozen
  if kind == "precomputed":  # it waits outside
    by_shapes -= held.reference
  assert given == pytest.approx(by_shapes, rel=2e-3, abs=2**12)


def test_each_way_to_save_saves_what_it_says(on_eight):
  held = {kind: of_kind for kind, (of_kind, _) in on_eight.items()}
  plain = held["all"]
  assert plain.reference == plain.trained
  assert plain.optimizer == pytest.approx(2 * plain.trained, rel=1e-3)
  assert held["precomputed"].reference == plain.reference  # to evaluate with
  assert held["moved"].reference == 0
  assert held["moved"].on_host == plain.reference
  lora = held["lora"]
  assert lora.reference == 0
  assert lora.frozen == pytest.approx(plain.trained, rel=1e-3)
  assert lora.optimizer < plain.optimizer / 5
  assert held["block"].temporary < 0.8 * plain.temporary
  assert held["parts"].temporary < 0.9 * held["block"].temporary
  assert held["block"]._replace(temporary=0) == plain._replace(temporary=0)


def test_weights_are_split_over_fsdp_alone(on_eight, tmp_path):
  run = make_run(tmp_path, (1, 1, 1), MODEL)
  alone = memory.device_bytes(run.abstract_state.params)
  held, _ = on_eight["all"]
  assert held.trained == pytest.approx(alone / 4, rel=0.02)


def test_a_dry_run_tells_the_same(tmp_path):
  changes = {"offload.optimizer": True}
  run = make_run(tmp_path, (1, 1, 1), MODEL, **changes)
  held = memory.held(run)
  assert held.on_host == pytest.approx(2 * held.trained, rel=1e-3)
  text = dry_run.describe(run.config)
  for line in memory.render(held):
    assert line in text


def plan(tmp_path, *args):
  corpus = write_corpus(tmp_path, pairs=48)
  done = subprocess.run(
    [
      sys.executable, str(ROOT / "scripts" / "plan_memory.py"),
      f"--config={ROOT}/configs/dpo.py", "--config.model.tokenizer=bytes",
      f"--config.model.path={write_model(tmp_path / 'model', **MODEL)}",
      f"--config.data.source={corpus['pairs']}", "--config.data.cache_dir=",
      "--config.train.batch_size=16", "--config.data.eval_rows=0",
      "--config.mesh.fsdp=16", *args,
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


def test_devices_that_are_not_there_are_planned_for(tmp_path):
  code, out, err = plan(tmp_path, "--config.mesh.data=1")
  assert code == 0, err
  assert "'fsdp': 16" in out and "16 devices" in out
  parts = re.findall(r"^  (\w+) +[\d.]+ MiB$", out, re.M)
  assert parts == ["trained", "reference", "optimizer", "batch", "temporary"]
  total = re.search(r"memory +([\d.]+) MiB a device", out)[1]
  each = map(float, re.findall(r"^  \w+ +([\d.]+) MiB$", out, re.M))
  assert float(total) == pytest.approx(sum(each), abs=0.4)


def test_a_mesh_without_numbers_is_refused(tmp_path):
  code, _, err = plan(tmp_path)
  assert (code, err.count("\n")) == (2, 1)
  assert "config.mesh.data=-1" in err


if __name__ == "__main__":
  assert jax.device_count() == 8
  print(json.dumps(measured(pathlib.Path(sys.argv[1]))))
