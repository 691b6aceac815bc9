"""How devices become a mesh, in one slice and in several; with stand-ins."""

import dataclasses
import itertools

import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
  """What the making of a mesh reads of one."""

  id: int
  slice_index: int
  platform: str = "tpu"
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0
  device_kind: str = "TPU v5 lite"

  @property
  def process_index(self):
    return self.id // 4


def slices(n, width=4, height=2, platform="tpu", **more):
  """n slices of width x height devices, as jax lists them."""
  at = [(x, y, 0) for y, x in itertools.product(range(height), range(width))]
  places = itertools.product(range(n), at)
  return [
    Device(i, index, platform, coords, **more)
    for i, (index, coords) in enumerate(places)
  ]


@pytest.mark.parametrize("sizes", [(2, 8, 1), (2, 4, 2), (4, 2, 2), (-1, 4, 1)])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_data_goes_across_slices_and_the_rest_stays_inside(sizes, platform):
  kind = {} if platform == "tpu" else {"device_kind": "H100"}
  devices = slices(2, platform=platform, **kind)
  # In any order, as processes may have come.
  mesh = sharding.make_mesh(*sizes, devices=devices[1::2] + devices[::2])
  assert mesh.axis_names == sharding.AXES
  found = mesh.devices
  assert sorted(d.id for d in found.flat) == list(range(16))
  of_slice = np.vectorize(lambda d: d.slice_index)(found)
  for one in of_slice:  # what shares a place along data
    assert len(set(one.flat)) == 1
  half = len(of_slice) // 2
  assert set(of_slice[:half].flat) == {0} and set(of_slice[half:].flat) == {1}


def test_a_torus_is_cut_where_an_axis_asks_for_it():
  devices = slices(4, 4, 4)
  mesh = sharding.make_mesh(8, 4, 2, devices=devices)
  assert dict(mesh.shape) == {"data": 8, "fsdp": 4, "tensor": 2}
  assert sorted(d.id for d in mesh.devices.flat) == list(range(64))


def test_one_slice_is_a_plain_mesh():
  mesh = sharding.make_mesh(1, 4, 2, devices=slices(1))
  assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
  assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize("sizes", [(1, 16, 1), (1, 8, 2), (3, 8, 1)])
def test_what_does_not_fit_slices_is_refused(sizes):
  n = 3 if 3 in sizes else 2
  devices = slices(n) if n == 2 else slices(2) + slices(1, 8, 1)
  with pytest.raises(ConfigError, match=r"multiple of 2|one size") as error:
    sharding.make_mesh(*sizes, devices=devices)
  assert "\n" not in str(error.value)


def test_fsdp_may_span_gpu_hosts():
  devices = slices(2, platform="gpu", device_kind="H100")
  mesh = sharding.make_mesh(1, 16, 1, devices=devices)
  assert [d.id for d in mesh.devices.flat] == list(range(16))


def test_a_mesh_that_does_not_cover_the_devices_is_refused():
  with pytest.raises(ConfigError, match="multiply to 8"):
    sharding.make_mesh(2, 3, 1, devices=slices(1))
