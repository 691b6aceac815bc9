"""Small checkpoints of the Llama family, and what tests ask of them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf, llama

ROOT = pathlib.Path(__file__).resolve().parents[1]


def start(script, *args, devices=8):
  """A process of its own in which `script` runs on fake devices."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ
    | {
      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "XLA_FLAGS": flags,
    },
  )


def finished(process, seconds=120):
  """What it printed, once it ended well."""
  out, errors = process.communicate(timeout=seconds)
  assert process.returncode == 0, errors[-3000:]
  return out


def abstract(config, **compute):
  model = llama.Model(config, llama.Compute(**compute))
  return jax.eval_shape(model.init_variables, jax.random.key(0))


def load(folder, **compute):
  """(Config, variables) of a Llama folder."""
  module, config = hf.read_config(folder)
  variables = hf.load_variables(
    folder, module.HF_NAMES, abstract(config, **compute)
  )
  return config, variables


def tensors(folder):
  """Every tensor of a folder by name, read by safetensors alone."""
  found = {}
  for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
    found |= safetensors.numpy.load_file(file)
  return found


def same_bytes(left, right):
  assert sorted(left) == sorted(right)
  for name, array in left.items():
    assert array.dtype == right[name].dtype, name
    assert array.shape == right[name].shape, name
    assert array.tobytes() == right[name].tobytes(), name


def copy_of(folder, to, **changes):
  """A copy in which config.json has other values; `...` drops a key."""
  shutil.copytree(folder, to)
  for path in (to, *to.iterdir()):
    path.chmod(0o755)
  file = to / "config.json"
  values = json.loads(file.read_text()) | changes
  values = {k: v for k, v in values.items() if v is not ...}
  file.write_text(json.dumps(values))
  return to


def random_folder(to, **options):
  """A small random checkpoint, so that tests need no shared data."""
  sizes = {
    "vocab_size": 24, "width": 8, "ffn": 12, "layers": 3, "heads": 4,
    "kv_heads": 2, "head_dim": 2,
  }  # fmt: skip
  config = llama.Config(**sizes | options)
  rng = np.random.default_rng(3)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract(config)
  )
  hf.save_checkpoint(to, llama, config, variables)
  return config, variables


def refused(folder, *words):
  """Loading is refused in one line that holds all the words."""
  with pytest.raises(CheckpointError) as error:
    load(folder)
  message = str(error.value)
  assert "\n" not in message
  for word in (str(folder), *words):
    assert word in message
  return message


def rewrite(folder, change):
  file = folder / "model.safetensors"
  found = safetensors.numpy.load_file(file)
  change(found)
  safetensors.numpy.save_file(found, file)
