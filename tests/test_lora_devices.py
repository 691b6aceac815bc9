"""Adapters, a packed base and frozen weights on eight devices give the numbers
of one."""

import json
import pathlib
import sys

import numpy as np
import pytest
from devices import run_on_eight
from runs import small_config

from dpo_jax import sharding
from dpo_jax.data.corpus import write_corpus
from dpo_jax.run import Run

LORA = {"lora.rank": 4, "lora.dropout": 0.0}
KINDS = {
  "lora": LORA,
  "packed": LORA | {"model.quantize": "nf4", "model.remat": "block"},
  "frozen": {"optim.freeze": "embed|layers/0/", "optim.rates": "mlp=0.5"},
}
MESHES = {"lora": (1, 4, 2), "packed": (2, 2, 2), "frozen": (2, 4, 1)}


def numbers(corpus, kind, mesh):
  """Loss and gradient norm of three steps, and how the trained part lies."""
  data, fsdp, tensor = mesh
  sizes = {"model.heads": 4, "model.kv_heads": 2, "model.width": 32}
  config = small_config(
    corpus, **sizes, **KINDS[kind], **{"mesh.data": data, "mesh.fsdp": fsdp,
    "mesh.tensor": tensor, "data.row_length": 0, "data.row_counts": 1,
    "train.batch_size": 8},
  )  # fmt: skip
  run = Run(config)
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  found = []
  for step in range(3):
    batch, _ = run.train_plan[step]
    batch = sharding.put_batch(batch, run.built.mesh)
    state, sums = run.step(state, reference, batch, frozen)
    found.append([float(sums[k].mean()) for k in ("loss", "grad_norm")])
  return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.fixture(scope="module")
def on_eight(corpus):
  paths = {name: str(path) for name, path in corpus.items()}
  printed = run_on_eight(__file__, json.dumps(paths))
  return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_give_the_numbers_of_one(corpus, on_eight, kind):
  one = numbers(corpus, kind, (1, 1, 1))
  assert one[0][0] > one[2][0]  # it learns
  np.testing.assert_allclose(on_eight[kind], one, rtol=2e-4)


if __name__ == "__main__":
  given = {k: pathlib.Path(v) for k, v in json.loads(sys.argv[1]).items()}
  print(
    json.dumps(
      {kind: numbers(given, kind, mesh) for kind, mesh in MESHES.items()}
    )
  )
