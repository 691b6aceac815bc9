"""Checksums: the same wherever an array lies, another for any other content."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_eight

from dpo_jax import checksums, sharding

DTYPES = ["float32", "bfloat16", "int32", "int8", "bool", "uint16"]


def tree(dtype="float32", shape=(6, 16), seed=0):
  words = np.random.default_rng(seed).integers(0, 2, shape)
  return {"a": {"b": jnp.asarray(words, dtype)}}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_element_counts(dtype):
  x = tree(dtype)
  whole = checksums.of_tree(x)["a/b"]
  seen = {whole}
  values = np.asarray(x["a"]["b"])
  for i in range(values.size):
    other = values.copy()
    other.flat[i] = 1 - values.flat[i] if dtype != "bool" else ~values.flat[i]
    seen.add(checksums.of_tree({"a": {"b": jnp.asarray(other)}})["a/b"])
  assert len(seen) == values.size + 1


def test_every_bit_of_a_float_counts():
  x = np.linspace(-3, 3, 8, dtype=np.float32)
  seen = {checksums.of_tree({"x": x})["x"]}
  for i in range(x.size):
    for bit in range(32):
      words = x.copy().view(np.uint32)
      words[i] ^= np.uint32(1 << bit)
      seen.add(checksums.of_tree({"x": words.view(np.float32)})["x"])
  assert len(seen) == 1 + 8 * 32  # NaNs and minus zero among them


def test_elements_that_change_places_show():
  x = jnp.arange(12.0).reshape(3, 4)
  sums = [checksums.of_tree({"x": y})["x"] for y in (x, x[::-1], x[:, ::-1])]
  assert len(set(sums)) == 3


def test_a_scalar_and_nothing_have_one():
  sums = checksums.of_tree({"n": jnp.int32(3), "e": jnp.zeros((0, 4))})
  assert sums["n"] != checksums.of_tree({"n": jnp.int32(4)})["n"]
  assert sums["e"] == "0" * 16


def test_eight_bytes_an_element_count_in_both_halves():
  with jax.enable_x64(True):
    x = jnp.arange(4, dtype=jnp.int64)
    sums = {
      checksums.of_tree({"x": y})["x"] for y in (x, x + 1, x + 2**32, x * -1)
    }
  assert len(sums) == 4


def test_where_an_array_lies_does_not_matter():
  alone = checksums.of_tree(_sharded_tree(None))
  for line in run_on_eight(__file__).splitlines():
    assert line == str(alone)


def _sharded_tree(mesh):
  x = {
    "layers": {"mlp": {"up": {"kernel": jnp.arange(2 * 16 * 8.0)}}},
    "embed": jnp.arange(24, dtype=jnp.bfloat16),
  }
  x["layers"]["mlp"]["up"]["kernel"] = x["layers"]["mlp"]["up"][
    "kernel"
  ].reshape(2, 16, 8)
  x["embed"] = x["embed"].reshape(8, 3)
  return x if mesh is None else jax.device_put(x, sharding.shard_tree(x, mesh))


if __name__ == "__main__":
  assert pathlib.Path(__file__).exists() and jax.device_count() == 8
  for sizes in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]:
    print(checksums.of_tree(_sharded_tree(sharding.make_mesh(*sizes))))
