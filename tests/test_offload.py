"""Reference and moments in host memory: the same numbers, and where they move.

CPUs have such memory, and move nothing; what another platform is told to move
is read off the program that is lowered for it.
"""

import collections
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from devices import run_on_eight
from runs import (  # noqa: F401  a fixture
  STEPS,
  compile_once,
  metric_rows,
  save_base,
  small_config,
  stop_after,
)

from dpo_jax import checksums, memory, offload, sharding
from dpo_jax.data.corpus import write_corpus
from dpo_jax.errors import ConfigError
from dpo_jax.processes import Stopped
from dpo_jax.run import Run
from dpo_jax.train import train
from dpo_jax.weights import load_variables

BOTH = {"offload.reference": True, "offload.optimizer": True}
KINDS = {
  "whole": {"model.dtype": "bfloat16"},
  "frozen": {"optim.freeze": "embed|layers/0/", "train.microbatches": 2},
}


def steps(corpus, **changes):
  """Numbers and weights of three steps, and what lies where after them."""
  sizes = {"model.heads": 4, "model.kv_heads": 2, "model.width": 32}
  rows = {"data.row_length": 0, "data.row_counts": 1, "train.batch_size": 8}
  run = Run(small_config(corpus, **sizes, **rows, **changes))
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  found = []
  for step in range(3):
    batch = sharding.put_batch(run.train_plan[step][0], run.built.mesh)
    state, sums = run.step(state, reference, batch, frozen)
    found.append([float(sums[k].mean()) for k in ("loss", "grad_norm")])
  on_host = {
    "reference": memory.host_bytes(reference),
    "moments": memory.host_bytes(state.opt_state),
    "weights": memory.host_bytes([state.params, frozen]),
  }
  return [found, checksums.of_tree(state), on_host]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.fixture(scope="module")
def on_eight(corpus):
  paths = {name: str(path) for name, path in corpus.items()}
  printed = run_on_eight(__file__, json.dumps(paths))
  return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_compute_the_same_bits(on_eight, kind):
  (numbers, sums, left), (same, again, moved) = on_eight[kind]
  assert numbers == same and sums == again
  assert numbers[0][0] > numbers[2][0]  # it learns
  assert not any(left.values())
  assert moved["reference"] and moved["moments"] and not moved["weights"]
  assert moved["moments"] == 2 * moved["reference"]  # each split alike


@pytest.mark.slow
def test_a_run_goes_on_with_both_moved(corpus, tmp_path, monkeypatch):
  train(small_config(corpus), tmp_path / "plain")
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Stopped):
      train(small_config(corpus), tmp_path / "moved")
  summary = train(small_config(corpus, **BOTH), tmp_path / "moved")
  rows = metric_rows(tmp_path / "plain")  # of training and evaluation
  assert metric_rows(tmp_path / "moved") == rows
  assert rows[-1]["step"] == STEPS
  plain = json.loads((tmp_path / "plain" / "summary.json").read_text())
  assert summary["kl_to_reference"] == plain["kl_to_reference"] != 0
  samples = [tmp_path / x / "samples.jsonl" for x in ("plain", "moved")]
  assert samples[0].read_text() == samples[1].read_text()


def test_a_reference_of_its_own_is_read_past_the_device(corpus, tmp_path):
  base = save_base(corpus, tmp_path / "base")
  moved = {"offload.reference": True}
  run = Run(small_config(corpus, **{"reference.path": base}, **moved))
  reference = run.load_reference(None, None)
  sums = checksums.of_tree(load_variables(run.config, run.built, base))
  assert checksums.of_tree(reference) == sums
  planned = run.abstract_reference()
  assert memory.device_bytes(reference) == memory.device_bytes(planned) == 0
  assert memory.host_bytes(reference) == memory.host_bytes(planned)


def lowered(corpus, platform, **changes):
  """The step as StableHLO for a platform; its run; shapes of what it gives and
  leaves on the device."""
  run = Run(small_config(corpus, **changes))
  traced = run.step.trace(*memory.step_inputs(run))
  state, sums = traced.out_info
  if run.config.offload.optimizer:
    state = state._replace(
      opt_state=[x for x in jax.tree.leaves(state.opt_state) if not x.shape]
    )
  given = [x.shape for x in jax.tree.leaves((state, sums))]
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  return text, run, collections.Counter(given)


def moves(text, to):
  """Shapes of what is moved into a memory."""
  found = re.findall(
    rf'annotate_device_placement.*?_xla_buffer_placement = "{to}".*?'
    r"-> tensor<([\dx]*)[a-z]+\d+>",
    text,
  )
  return collections.Counter(
    tuple(map(int, filter(None, x.split("x")))) for x in found
  )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_layers_of_the_reference_come_one_by_one(corpus, platform):
  moved = {"offload.reference": True}
  text, run, given = lowered(corpus, platform, **moved)
  reference = dict(run.abstract_reference()["params"])
  expected = [x.shape[1:] for x in jax.tree.leaves(reference.pop("layers"))]
  expected *= 2  # in the scan, and the last of them
  expected += [x.shape for x in jax.tree.leaves(reference)]
  # What the step gives is said to go to the device as well.
  assert moves(text, "device") == given + collections.Counter(expected)
  assert not moves(text, "pinned_host")


def test_moments_come_for_the_update_and_go_back(corpus):
  text, run, given = lowered(corpus, "tpu", **{"offload.optimizer": True})
  moments = [x.shape for x in jax.tree.leaves(run.abstract_state.opt_state)]
  moments = collections.Counter(shape for shape in moments if shape)
  assert moves(text, "pinned_host") == moments
  assert moves(text, "device") == moments + given
  before = text.index("annotate_device_placement")
  assert "stablehlo.while" in text[:before]  # layers forward and backward


def test_without_offload_nothing_is_moved(corpus):
  text, *_ = lowered(corpus, "tpu")
  assert "annotate_device_placement" not in text


def test_the_plan_tells_what_the_device_is_spared(corpus):
  plain, moved = (
    memory.held(Run(small_config(corpus, **c))) for c in ({}, BOTH)
  )
  assert plain.on_host == 0
  spared = plain.reference + plain.optimizer - moved.optimizer
  assert moved.reference == 0 and moved.optimizer < 100  # counts of steps
  assert moved.on_host == spared
  assert moved.total - moved.temporary == (
    plain.total - plain.temporary - spared
  )
  assert memory.render(moved)[-1].startswith("on its host ")


class Device:
  """What is read of one that has no such memory."""

  device_kind, platform = "Old Chip", "tpu"

  def addressable_memories(self):
    return [self]

  kind = "device"


def test_a_device_without_host_memory_is_refused(corpus, monkeypatch):
  devices = property(lambda _: [Device()])
  monkeypatch.setattr(jax.sharding.Mesh, "local_devices", devices)
  for setting in BOTH:
    with pytest.raises(ConfigError, match=rf"{setting}: Old Chip") as error:
      Run(small_config(corpus, **{setting: True}))
    assert "'pinned_host'; it has device" in str(error.value)


@pytest.mark.parametrize(
  "changes", [{"loss.name": "orpo"}, {"lora.rank": 2}], ids=["loss", "lora"]
)
def test_a_reference_that_is_not_there_is_not_moved(corpus, changes):
  with pytest.raises(ConfigError, match=r"config\.offload\.reference: "):
    Run(small_config(corpus, **changes, **{"offload.reference": True}))


def test_single_numbers_stay_and_fetching_is_nothing_on_the_device():
  mesh = sharding.make_mesh(-1)
  tree = sharding.placed(
    {"a": np.zeros(3, "f"), "count": np.zeros((), "f")}, mesh
  )
  there = offload.on_host(tree)
  assert offload.lies_on_host(there["a"])
  assert not offload.lies_on_host(there["count"])
  assert "device_put" not in str(jax.make_jaxpr(offload.fetched)(tree))


if __name__ == "__main__":
  assert jax.device_count() == 8
  jax.config.update("jax_disable_most_optimizations", True)  # takes longer
  given = {k: pathlib.Path(v) for k, v in json.loads(sys.argv[1]).items()}
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  print(
    json.dumps(
      {
        kind: [steps(given, **mesh, **changes, **o) for o in ({}, BOTH)]
        for kind, changes in KINDS.items()
      }
    )
  )
