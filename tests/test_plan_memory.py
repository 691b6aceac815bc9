"""What each device would hold, by shapes and by the compiler."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import flax.traverse_util as traverse
import jax
import pytest
from devices import ROOT, run_on_eight
from meshes import make_run, write_model

from dpo_jax import dry_run, memory, topology
from dpo_jax.data.corpus import write_corpus

MESH = (2, 4, 1)
KINDS = {
  "all": {},
  "none": {"model.remat": "none"},
  "block": {"model.remat": "block"},
  "parts": {"model.remat": "block", "train.microbatches": 4},
  "lora": {"lora.rank": 4},
  "precomputed": {"reference.precompute": True},
  "moved": {"reference.precompute": True, "offload.reference": True},
}
MODEL = {"num_hidden_layers": 4, "vocab_size": 1024}


def measured(folder):
  """Of each kind: what is held, what the compiler says is handed in, and what
  is reckoned to be kept for the backward."""
  out = {}
  for kind, changes in KINDS.items():
    run = make_run(folder, MESH, MODEL, **changes)
    compiled = memory.compile_step(run)
    given = compiled.memory_analysis().argument_size_in_bytes
    out[kind] = [memory.held(run, compiled), given, memory.kept(run)]
  return out


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
  printed = run_on_eight(__file__, str(tmp_path_factory.mktemp("plans")))
  read = json.loads(printed.splitlines()[-1])
  return {kind: (memory.Held(*x), *rest) for kind, (x, *rest) in read.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_tell_what_the_compiler_counts(on_eight, kind):
  held, given, _ = on_eight[kind]
  by_shapes = held.total - held.temporary
  if kind == "precomputed":  # it waits outside
    by_shapes -= held.reference
  assert given == pytest.approx(by_shapes, rel=2e-3, abs=2**12)


@pytest.mark.slow
def test_each_way_to_save_saves_what_it_says(on_eight):
  held = {kind: of_kind for kind, (of_kind, *_) in on_eight.items()}
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
  assert plain.temporary < 0.8 * held["none"].temporary
  assert held["block"].temporary < 0.8 * plain.temporary
  assert held["parts"].temporary < 0.95 * held["block"].temporary
  assert held["block"]._replace(temporary=0) == plain._replace(temporary=0)


@pytest.mark.slow
def test_weights_are_split_over_fsdp_alone(on_eight, tmp_path):
  run = make_run(tmp_path, (1, 1, 1), MODEL)
  alone = memory.device_bytes(run.abstract_state.params)
  held = on_eight["all"][0]
  assert held.trained == pytest.approx(alone / 4, rel=0.02)


@pytest.mark.slow
def test_what_is_kept_for_the_backward_is_reckoned_by_shapes(on_eight):
  kept = {kind: reckoned for kind, (_, _, reckoned) in on_eight.items()}
  for kind in ("none", "all", "block", "lora"):
    held = on_eight[kind][0]
    gradients = held.trained
    assert kept[kind] + gradients == pytest.approx(held.temporary, rel=0.2)
  assert kept["all"] < 0.8 * kept["none"]
  assert kept["block"] < 0.7 * kept["all"]
  assert kept["parts"] < 0.7 * kept["block"]


def test_the_first_that_fits_is_computed_again(tmp_path):
  run = make_run(tmp_path, (1, 1, 1), MODEL)
  choices = ("minimal", "block", "offload")
  needs = []
  for remat in choices:
    run.recompute(remat)
    needs.append(memory.needed(run))
  assert needs[0] > 1.1 * needs[1] and needs[1] > needs[2]
  for remat, bytes_ in zip(choices, needs, strict=True):
    run.recompute("none")
    memory.fit(run, limit=int(bytes_ / 0.9) + 1)
    assert run.built.model.compute.remat == remat
  memory.fit(run, limit=1)  # nothing does, and the least is tried
  assert run.built.model.compute.remat == "offload"


@pytest.mark.parametrize(
  "changes",
  [{}, {"lora.rank": 4}, {"optim.freeze": "embed"}],
  ids=["all is trained", "adapters", "a part is frozen"],
)
def test_what_policy_and_reference_share_is_handed_over_once(tmp_path, changes):
  run = make_run(tmp_path, (1, 1, 1), MODEL, **changes)
  _, own, _, frozen = memory.step_inputs(run)
  own, frozen, both = (
    traverse.flatten_dict(x, sep="/")
    for x in (own, frozen, run.abstract_reference())
  )
  assert not own.keys() & frozen.keys()
  assert own.keys() | frozen.keys() >= both.keys()
  if "lora.rank" in changes:
    assert not own


def test_what_was_asked_for_is_computed_again_whatever_fits(tmp_path):
  run = make_run(tmp_path, (1, 1, 1), MODEL, **{"model.remat": "none"})
  memory.fit(run, limit=1)
  assert run.built.model.compute.remat == "none"


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
  assert "remat       minimal" in out
  parts = re.findall(r"^  (\w+) +[\d.]+ MiB$", out, re.M)
  assert parts == ["trained", "reference", "optimizer", "batch", "temporary"]
  total = re.search(r"memory +([\d.]+) MiB a device", out)[1]
  each = map(float, re.findall(r"^  \w+ +([\d.]+) MiB$", out, re.M))
  assert float(total) == pytest.approx(sum(each), abs=0.4)


def test_a_mesh_without_numbers_is_refused(tmp_path):
  code, _, err = plan(tmp_path)
  assert (code, err.count("\n")) == (2, 1)
  assert "config.mesh.data=-1" in err


NO_TPU_COMPILER = importlib.util.find_spec("libtpu") is None
NO_GPU_COMPILER = not any(
  importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)
)


@pytest.mark.parametrize(
  ("topology", "package"),
  [
    pytest.param(
      topology, package, marks=pytest.mark.skipif(there, reason="is installed")
    )
    for topology, package, there in (
      ("v5e:4x4", "jax[tpu]", not NO_TPU_COMPILER),
      ("h100:2x8", "jax[cuda13]", not NO_GPU_COMPILER),
    )
  ],
)
def test_without_their_compiler_devices_are_refused(
  tmp_path, topology, package
):
  args = "--config.mesh.data=1", f"--topology={topology}"
  code, _, err = plan(tmp_path, *args)
  assert (code, err.count("\n")) == (2, 1)
  assert f"--topology={topology}" in err and package in err


@pytest.mark.parametrize("topology", ["h100:many", "h100:2x2x2", "a100:"])
def test_gpus_are_to_be_counted(tmp_path, topology):
  args = "--config.mesh.data=1", f"--topology={topology}"
  code, _, err = plan(tmp_path, *args)
  assert (code, err.count("\n")) == (2, 1)
  assert f"--topology={topology}" in err and "a number of GPUs" in err


def test_of_what_a_gpu_has_jax_takes_three_quarters():
  assert topology.limit("h100:2x8") == pytest.approx(63.7e9, rel=1e-2)
  assert topology.limit("v5e:2x4") is None and topology.limit("") is None


@pytest.mark.skipif(NO_TPU_COMPILER, reason="libtpu is not installed")
def test_tpus_that_are_not_there_are_planned_for(tmp_path):
  code, out, err = plan(tmp_path, "--config.mesh.data=1", "--topology=v5e:4x4")
  assert code == 0, err
  assert "'fsdp': 16" in out and "XLA plans for CPUs" not in out
  assert re.search(r"^  all-gather +\d+ times", out, re.M)
  assert re.search(r"^  reduce-scatter +\d+ times", out, re.M)
  code, _, err = plan(tmp_path, "--config.mesh.data=1", "--topology=v9:9")
  assert code == 2 and "--topology=v9:9" in err
  code, _, err = plan(tmp_path, "--config.mesh.data=2", "--topology=v5e:4x4")
  assert code == 2 and "16 devices" in err


@pytest.mark.skipif(NO_GPU_COMPILER, reason="no compiler for GPUs installed")
@pytest.mark.parametrize("topology", ["a100:16", "h100:2x8", "h200:16"])
def test_gpus_that_are_not_there_are_planned_for(tmp_path, topology):
  args = "--config.mesh.data=1", f"--topology={topology}"
  code, out, err = plan(tmp_path, *args)
  assert code == 0, err
  assert "model.remat=auto: minimal, for about" in out + err
  assert "'fsdp': 16" in out and "XLA plans for CPUs" not in out
  assert re.search(r"^  all-gather +\d+ times", out, re.M)
  assert re.search(r"^  reduce-scatter +\d+ times", out, re.M)


if __name__ == "__main__":
  assert jax.device_count() == 8
  print(json.dumps(measured(pathlib.Path(sys.argv[1]))))
