"""NaN and infinity, wherever they come in: counted, and never applied."""

import hashlib
import json
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from devices import run_on_eight
from runs import (  # noqa: F401
  compile_once,
  metric_rows,
  on_base,
  save_base,
  small_config,
)

from dpo_jax import checkpoint, sharding
from dpo_jax.data.corpus import write_corpus
from dpo_jax.errors import UserError
from dpo_jax.run import Run
from dpo_jax.train import train

pytestmark = pytest.mark.usefixtures("compile_quickly")
BARE = {
  "sample.prompts": 0, "train.export": False, "data.eval_rows": 0,
  "train.eval_every": 0, "train.checkpoint_every": 1,
  "train.keep_checkpoints": 9, "train.log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=8)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
  return save_base(corpus, tmp_path_factory.mktemp("base") / "model")


def poison(monkeypatch, bad, rows):
  """The reference's log-probs of these examples are not numbers."""
  real = Run.precompute

  def precompute(run, reference):
    real(run, reference)
    run.train_plan.reference.logps[rows] = bad

  monkeypatch.setattr(Run, "precompute", precompute)


def saved_states(config, workdir):
  """Bytes of the whole state but its counters, by step."""
  abstract = Run(config).abstract_state
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    found = {}
    for step in saved.steps():
      state = saved.restore(step, abstract)
      leaves = jax.tree.leaves(state._replace(step=0, skipped=0))
      found[step] = hashlib.sha256(
        b"".join(np.asarray(x).tobytes() for x in leaves)
      ).hexdigest()
      assert all(np.isfinite(x).all() for x in leaves)
  return found


def skipped(workdir):
  rows = metric_rows(workdir)
  return [r["step"] for r in rows if r["split"] == "train" and r["skipped"]]


def named(workdir):
  """Step -> rows of the data, of those that were skipped."""
  lines = (workdir / "skipped.jsonl").read_text().splitlines()
  return {row["step"]: row["rows"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_poisoned_pair_costs_its_batches_and_nothing_else(
  corpus, tmp_path, monkeypatch, bad
):
  poison(monkeypatch, bad, [3])
  config = small_config(corpus, **BARE, **{"reference.precompute": True})
  plan = Run(config).train_plan
  hit = [s + 1 for s in range(len(plan)) if 3 in plan.members(s)]
  assert len(hit) == 3  # batches of half of the data
  summary = train(config, tmp_path / "run")
  assert skipped(tmp_path / "run") == hit
  assert named(tmp_path / "run") == {
    step: plan.members(step - 1).tolist() for step in hit
  }
  assert summary["skipped_steps"] == 3 and summary["steps"] == 6
  states = saved_states(config, tmp_path / "run")
  for step in range(2, 7):
    assert (states[step] == states[step - 1]) == (step in hit)


def test_when_every_batch_is_poisoned_the_run_ends_with_the_state_it_had(
  corpus, tmp_path, monkeypatch
):
  config = small_config(
    corpus, **BARE, **{"reference.precompute": True, "train.max_skipped": 3}
  )
  poison(monkeypatch, np.nan, slice(None))
  with pytest.raises(UserError, match="3 steps in a row, up to step 3,"):
    train(config, tmp_path / "run")
  assert len(set(saved_states(config, tmp_path / "run").values())) == 1
  assert list(named(tmp_path / "run")) == [1, 2, 3]
  # What was saved is what the run began with: trained on, it is as good as new.
  monkeypatch.undo()
  summary = train(config, tmp_path / "run")
  assert summary["steps"] == 6 and np.isfinite(
    metric_rows(tmp_path / "run")[-1]["loss"]
  )


def test_a_weight_that_is_no_number_ends_the_run_at_once(
  corpus, base, tmp_path
):
  broken = tmp_path / "broken"
  shutil.copytree(base, broken)
  file = broken / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.norm.weight"][2] = np.nan
  safetensors.numpy.save_file(tensors, file)
  config = on_base(corpus, str(broken), **BARE, **{"train.max_skipped": 2})
  with pytest.raises(UserError, match="2 steps in a row, up to step 2"):
    train(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_at_a_rate_of_a_billion_nothing_but_numbers_is_applied(
  corpus, tmp_path, name
):
  config = small_config(
    corpus, **BARE,
    **{"optim.learning_rate": 1e9, "optim.warmup": 0.0, "optim.name": name,
       "optim.schedule": "constant", "optim.weight_decay": 0.1,
       "train.max_skipped": 3, "train.steps": 9},
  )  # fmt: skip
  try:
    train(config, tmp_path / "run")
  except UserError as e:
    assert "3 steps in a row" in str(e)
  states = saved_states(config, tmp_path / "run")
  lost = skipped(tmp_path / "run")
  assert bool(lost) == (name == "adamw")  # clipped, the other one stays sane
  for step in lost:
    assert states.get(step, states[step - 1]) == states[step - 1]


# On many devices, where only one of them sees the bad pair


def one_bad_row(corpus):
  """Digests, by device, of a state before and after a poisoned step."""
  config = small_config(
    corpus, **BARE,
    **{"train.batch_size": 8, "data.row_length": 384, "mesh.data": 2,
       "mesh.fsdp": 4, "reference.precompute": True},
  )  # fmt: skip
  run = Run(config)
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  run.precompute(reference)
  run.train_plan.reference.logps[3] = np.nan
  good = run.train_plan[0][0]
  bad = ~np.isfinite(good.reference.logps).all(axis=(1, 2))
  clean = good._replace(
    reference=jax.tree.map(lambda x: np.nan_to_num(x), good.reference)
  )
  digests, counts = [], []
  for batch in (clean, good, clean):
    state, sums = run.step(
      state, None, sharding.put_batch(batch, run.built.mesh), frozen
    )
    digests.append(by_device(state._replace(step=0, skipped=0)))
    counts.append([int(state.skipped), float(sums["skipped"].total)])
    assert {int(s.data) for s in state.skipped.addressable_shards} == {
      int(state.skipped)
    }
  return {
    "rows": len(bad), "bad": int(bad.sum()), "digests": digests,
    "counts": counts,
  }  # fmt: skip


def by_device(state):
  found = {d.id: hashlib.sha256() for d in jax.devices()}
  for leaf in jax.tree.leaves(state):
    for shard in getattr(leaf, "addressable_shards", ()):
      found[shard.device.id].update(np.asarray(shard.data).tobytes())
  return {str(key): digest.hexdigest() for key, digest in found.items()}


def test_a_bad_pair_on_one_device_of_eight_stops_the_update_of_all(corpus):
  said = run_on_eight(
    __file__, json.dumps({k: str(v) for k, v in corpus.items()})
  )
  found = json.loads(said.splitlines()[-1])
  assert found["rows"] == 8 and found["bad"] == 1
  assert found["counts"] == [[0, 0], [1, 1], [1, 0]]
  before, after, later = found["digests"]
  assert len(before) == 8
  for device, digest in before.items():
    assert after[device] == digest != later[device]


if __name__ == "__main__":
  print(json.dumps(one_bad_row(json.loads(sys.argv[1]))))
