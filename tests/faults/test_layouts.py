"""The same numbers on any number of devices, in any number of processes."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from faults.launch import checksums, launch, rows

pytestmark = pytest.mark.slow

EXPORT = "--config.train.export=true"
STEPWISE = "--config.train.checkpoint_every=3"


def weights(workdir):
  return load_file(workdir / "model" / "model.safetensors")


def difference(workdir, other):
  """Largest difference of a weight, relative to the largest of its array."""
  ours, theirs = weights(workdir), weights(other)
  return max(
    float(np.abs(ours[k] - theirs[k]).max() / np.abs(theirs[k]).max())
    for k in ours
  )


def same_losses(workdir, other):
  """To 1e-6 after ten steps. On the way a little more is allowed: the loss of a
  pair comes from sums of some -200 nats, whose float32 has steps of 1.5e-5."""
  ours, theirs = (
    [r["loss"] for r in rows(x) if r["split"] == "train"]
    for x in (workdir, other)
  )
  assert len(theirs) == 10
  np.testing.assert_allclose(ours, theirs, rtol=3e-6)
  np.testing.assert_allclose(ours[-1], theirs[-1], rtol=1e-6)


@pytest.fixture(scope="module")
def eight(corpus, xla, tmp_path_factory):
  """A run on eight devices of one process."""
  workdir = tmp_path_factory.mktemp("eight") / "run"
  run = launch(corpus, workdir, EXPORT, STEPWISE, devices=8, cache=xla)
  assert run.wait() == [0]
  return workdir


def test_one_device_twice_is_equal_to_the_bit(corpus, xla, straight, tmp_path):
  assert launch(corpus, tmp_path / "run", cache=xla).wait() == [0]
  assert checksums(tmp_path / "run") == checksums(straight)
  assert rows(tmp_path / "run") == rows(straight)


def test_eight_devices_twice_are_equal_to_the_bit(corpus, xla, eight, tmp_path):
  run = launch(corpus, tmp_path / "run", EXPORT, devices=8, cache=xla)
  assert run.wait() == [0]
  assert checksums(tmp_path / "run") == checksums(eight)
  assert rows(tmp_path / "run") == rows(eight)


@pytest.mark.parametrize(
  "mesh",
  [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}],
  ids=["2x4", "2x2x2"],
)
def test_every_mesh_gives_the_losses_of_one_device(
  corpus, xla, straight, tmp_path, mesh
):
  flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
  run = launch(corpus, tmp_path / "run", *flags, devices=8, cache=xla)
  assert run.wait() == [0]
  same_losses(tmp_path / "run", straight)


def test_eight_devices_give_the_losses_of_one(straight, eight):
  same_losses(eight, straight)


@pytest.mark.parametrize("counts", [(8, 4, 1), (1, 8, 4)])
def test_the_number_of_devices_may_change_on_the_way(
  corpus, xla, eight, tmp_path, counts
):
  workdir = tmp_path / "run"
  for devices, step in zip(counts, (3, 6, None), strict=True):
    run = launch(corpus, workdir, EXPORT, STEPWISE, devices=devices, cache=xla)
    if step:
      run.until_saved(step)
      run.kill()
    assert run.wait() == ([-9] if step else [0])
  assert difference(workdir, eight) < 4e-6
  same_losses(workdir, eight)
