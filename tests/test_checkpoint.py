"""Checkpoints: what is read is what was written, or it is not read."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import checkpoint, stored
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.errors import CheckpointError, DataError
from dpo_jax.stored import DamagedError, saved_steps


def state(step):
  x = np.random.default_rng(step).normal(size=(64, 33)).astype(np.float32)
  return {
    "params": {"w": jnp.asarray(x), "b": jnp.asarray(x[0], jnp.bfloat16)},
    "step": jnp.int32(step),
  }


def abstract():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state(0),
  )


def accept(meta):
  assert meta["who"] == "me"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  place = tmp_path_factory.mktemp("checkpoints") / "steps"
  with Checkpoints(place) as saved:
    for step in (1, 2):
      saved.save(step, state(step), {"who": "me", "step": step})
  return place


def same(ours, step):
  jax.tree.map(np.testing.assert_array_equal, ours, state(step))


def test_what_is_read_is_what_was_written(written, tmp_path):
  place = shutil.copytree(written, tmp_path / "steps")
  with Checkpoints(place) as saved:
    step, meta, ours = saved.newest(abstract(), accept)
  assert (step, meta["step"]) == (2, 2)
  same(ours, 2)
  part = stored.read_trained(place, 1, abstract()["params"])
  jax.tree.map(np.testing.assert_array_equal, part, state(1)["params"])


def files_of(step: pathlib.Path):
  return sorted(p for p in step.rglob("*") if p.is_file())


def damages(file: pathlib.Path):
  """What can become of a file: gone, cut, empty, some bit another."""
  size = file.stat().st_size
  yield "deleted", None
  yield "halved", file.read_bytes()[: size // 2]
  yield "emptied", b""
  rng = np.random.default_rng(size)
  for bit in rng.integers(0, 8 * size, 8 if "/d/" in str(file) else 4):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    yield f"bit {bit}", bytes(content)


def test_no_damage_to_any_file_gives_other_numbers(written, tmp_path):
  cases = fell_back = 0
  for file in files_of(written / "2"):
    for what, content in damages(file):
      place = tmp_path / str(cases)
      shutil.copytree(written, place)
      victim = place / file.relative_to(written)
      victim.unlink()
      if content is not None:
        victim.write_bytes(content)
      with Checkpoints(place) as saved:
        step, _, ours = saved.newest(abstract(), accept)
      assert step in (1, 2), (file, what)
      same(ours, step)
      if step == 1:
        assert (place / "damaged-2").is_dir() and saved_steps(place) == [1]
        fell_back += 1
      cases += 1
      shutil.rmtree(place)
  # Most of what lies there is needed; what is not may be lost.
  assert cases >= 50 and fell_back > cases / 3, (cases, fell_back)


def damage_state(step: pathlib.Path):
  """Another bit in the middle of the largest file."""
  largest = max(files_of(step / "state"), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)


def test_a_run_that_is_to_stop_at_damage_stops(written, tmp_path):
  place = shutil.copytree(written, tmp_path / "steps")
  damage_state(place / "2")
  with Checkpoints(place) as saved, pytest.raises(DamagedError, match="/2"):
    saved.newest(abstract(), accept, strict=True)
  assert saved_steps(place) == [1, 2]


def test_where_nothing_is_intact_nothing_starts_from_scratch(written, tmp_path):
  place = shutil.copytree(written, tmp_path / "steps")
  for step in ("1", "2"):
    damage_state(place / step)
  for _ in range(2):  # nor at the next attempt
    with Checkpoints(place) as saved, pytest.raises(DamagedError, match="none"):
      saved.newest(abstract(), accept)
    assert saved_steps(place) == [1, 2]


def test_a_step_that_was_set_aside_can_be_written_again(written, tmp_path):
  place = shutil.copytree(written, tmp_path / "steps")
  damage_state(place / "2")
  with Checkpoints(place) as saved:
    saved.newest(abstract(), accept)
    saved.save(2, state(2), {"who": "me", "step": 2})
    saved.wait()
    same(saved.newest(abstract(), accept)[2], 2)


def test_exported_weights_are_verified_too(written, tmp_path):
  place = shutil.copytree(written, tmp_path / "steps")
  files = files_of(place / "2" / "state")
  found = 0
  for file in files:
    content = bytearray(file.read_bytes())
    if not content:
      continue
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    try:
      part = stored.read_trained(place, 2, abstract()["params"])
    except DamagedError:
      found += 1
    else:
      jax.tree.map(np.testing.assert_array_equal, part, state(2)["params"])
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
  assert found


def test_a_document_that_was_edited_is_not_believed(written, tmp_path):
  place = shutil.copytree(written, tmp_path / "steps")
  (file,) = [
    p for p in files_of(place / "2" / "meta") if "who" in p.read_text()
  ]
  file.write_text(file.read_text().replace('"me"', '"you"'))
  with pytest.raises(DamagedError, match="changed since"):
    stored.read_meta(place, 2)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda x: x.update(step=x["step"].astype(float)), ["int32", "float32"]),
    (lambda x: x["params"].pop("b"), ["params/b", "nothing"]),
    (lambda x: x["params"].update(w=jnp.zeros((64, 34))), ["[64, 33]", "34"]),
  ],
)
def test_a_state_of_other_arrays_is_refused(written, change, words):
  with jax.disable_jit():
    other = state(0)
    change(other)
  with Checkpoints(written) as saved:
    with pytest.raises(CheckpointError) as error:
      saved.restore(2, other)
    assert not isinstance(error.value, DamagedError)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_step_that_is_there_is_not_saved_in_silence(written):
  with (
    Checkpoints(written) as saved,
    pytest.raises(CheckpointError, match="step 2 not saved; newest is 2"),
  ):
    saved.save(2, state(2), {})


def test_the_newest_and_the_best_are_kept(tmp_path):
  values = {1: 0.5, 2: 0.2, 3: 0.9, 4: float("nan"), 5: None, 6: 0.4}
  for best, kept in (("max", [3, 5, 6]), ("min", [2, 5, 6]), ("", [5, 6])):
    place = tmp_path / (best or "none")
    # In two parts: what was saved before counts as well.
    for steps in ((1, 2, 3), (4, 5, 6)):
      with Checkpoints(place, 2, best=best) as saved:
        for step in steps:
          saved.save(step, state(step), {"step": step}, values[step])
    assert saved_steps(place) == kept


def test_saving_into_nothing_says_how_much_is_free(tmp_path, monkeypatch):
  with Checkpoints(tmp_path / "steps") as saved:
    saved.save(1, state(1), {"step": 1})
    saved.wait()

    def full(*_, **__):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved._manager, "save", full)
    with pytest.raises(CheckpointError, match=r"bytes free.*step 1 is there"):
      saved.save(2, state(2), {"step": 2})


def test_what_an_interrupted_save_left_is_removed(written, tmp_path):
  place = shutil.copytree(written, tmp_path / "steps")
  left = place / "3.orbax-checkpoint-tmp"
  left.mkdir()
  (left / "part").write_text("x")
  with Checkpoints(place) as saved:
    assert saved.steps() == [1, 2]
  assert not left.exists()


def test_documents_are_json_with_a_digest(written):
  meta = stored.read_meta(written, 1)
  assert meta["arrays"]["params/w"] == "float32[64, 33]"
  assert len(meta["checksums"]["params/w"]) == 16
  json.dumps(meta)


def test_a_disk_that_went_away_is_one_sentence(tmp_path, monkeypatch):
  def gone(*_, **__):
    raise OSError(116, "Stale file handle")

  with (
    pytest.raises(CheckpointError, match="not to be reached: Stale file"),
    Checkpoints(tmp_path / "run") as saved,
  ):
    monkeypatch.setattr(saved._manager, "save", gone)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", gone)
    saved.save(1, state(1), {})


def test_a_directory_that_cannot_be_made_is_one_sentence():
  with pytest.raises(DataError, match="/proc/checkpoints: cannot be written"):
    Checkpoints("/proc/checkpoints")  # where not even root writes
