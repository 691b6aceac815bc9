"""Attention kernels on eight devices: each runs its own rows and heads."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mirrored_rows as mirrored
from devices import run_on_eight
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import collectives, sharding
from dpo_jax.models import attention
from dpo_jax.models.blockwise import Window

MESHES = {"rows and heads": (2, 2, 2), "too few heads": (2, 1, 4)}


def with_gradients(function, inputs):
  def run(q, k, v, g, start, end, window):
    out, pull_back = jax.vjp(
      lambda *x: function(*x, start, end, window=window), q, k, v
    )
    return out, *pull_back(g)

  compiled = jax.jit(run).lower(*inputs).compile()
  return compiled(*inputs), compiled.as_text()


def measured(name, sizes):
  """The largest difference from one device's dense attention, and how many
  arrays move."""
  rng = np.random.default_rng(0)
  start, end = map(jnp.asarray, mirrored.random_ranges(rng, 4, 160))
  q, k, v, g = (
    jnp.asarray(rng.normal(size=(4, 160, heads, 8)), jnp.float32)
    for heads in (4, 2, 2, 4)
  )
  at = jnp.asarray(rng.integers(0, 99, (4, 160)), jnp.int32)
  window = Window(at - 50, at)
  dense = functools.partial(attention.attention, implementation="dense")
  expected, _ = with_gradients(dense, (q, k, v, g, start, end, window))
  mesh = sharding.make_mesh(*sizes)
  heads = "tensor" if 2 % sizes[2] == 0 else None
  put = lambda x, *spec: jax.device_put(
    x, NamedSharding(mesh, P(sharding.BATCH, *spec))
  )
  inputs = [put(x, None, heads) for x in (q, k, v, g)]
  inputs += [put(start), put(end), jax.tree.map(put, window)]
  kernel = functools.partial(attention.attention, implementation=name)
  found, text = with_gradients(sharding.Pins(mesh).attention(kernel), inputs)
  moved = sum(
    collectives.total(collectives.read(text), kind).count
    for kind in collectives.KINDS
  )
  split = [x.sharding.shard_shape(x.shape)[:3:2] for x in found]
  far = max(float(abs(a - b).max()) for a, b in zip(found, expected))
  return far, moved, split


@pytest.fixture(scope="module")
def on_eight():
  return json.loads(run_on_eight(__file__).splitlines()[-1])


@pytest.mark.parametrize("case", MESHES)
@pytest.mark.parametrize("name", attention.KERNELS)
def test_each_device_runs_its_own_rows_and_heads(on_eight, name, case):
  far, moved, split = on_eight[f"{name} {case}"]
  assert far < 1e-4
  # Where all devices of `tensor` run all heads, their gradients are added up.
  assert moved == (case == "too few heads")
  rows, heads = (1, 2) if case == "rows and heads" else (2, 1)
  of_queries, of_keys = [rows, 4 // heads], [rows, 2 // heads]
  assert split == [of_queries, of_queries, of_keys, of_keys]


if __name__ == "__main__":
  print(
    json.dumps(
      {
        f"{name} {case}": measured(name, sizes)
        for name in attention.KERNELS
        for case, sizes in MESHES.items()
      }
    )
  )
