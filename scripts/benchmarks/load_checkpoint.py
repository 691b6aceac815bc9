"""Time and host memory of loading a checkpoint, beside a plain read of it.

  python scripts/benchmarks/load_checkpoint.py [--layers=22] [--folder=DIR]

Writes a random Llama checkpoint in bfloat16 (1.1 billion parameters unless told
otherwise) in several files, loads it in a process of its own, and saves it
again. "Anonymous" memory is what the process itself holds, heap and arrays,
sampled every 2 ms; file pages that the system may drop at any time are left
out. `VmHWM` is the kernel's own peak of everything, mapped files and libraries
included.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

SIZES = {"vocab_size": 32000, "width": 2048, "ffn": 5632, "heads": 32,
         "kv_heads": 4, "head_dim": 64}  # fmt: skip


def write(folder: pathlib.Path, layers: int, shard_bytes: int) -> None:
  """A checkpoint of random bits, layer after layer from one generator."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dpo_jax.models import llama
  from dpo_jax.models.hf_write import save_checkpoint

  config = llama.Config(layers=layers, tied=False, **SIZES)
  compute = llama.Compute(param_dtype=jnp.bfloat16)
  model = llama.Model(config, compute)
  shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
  rng = np.random.default_rng(0)

  def noise(path, index, part):
    bits = rng.integers(0, 2**14, part.shape, np.uint16)  # finite numbers
    return bits.view(part.dtype)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  save_checkpoint(
    folder, llama, config, zeros, max_shard_bytes=shard_bytes, transform=noise
  )


def status(key: str) -> float:
  """MB of this process by the kernel's account."""
  with open("/proc/self/status") as f:
    return next(int(x.split()[1]) for x in f if x.startswith(key)) / 1024


class Peak(threading.Thread):
  """The highest anonymous memory seen while it runs."""

  def __init__(self):
    super().__init__(daemon=True)
    self.mb, self._done = 0.0, threading.Event()

  def run(self) -> None:
    while not self._done.wait(0.002):
      self.mb = max(self.mb, status("RssAnon"))

  def stop(self) -> float:
    self._done.set()
    self.join()
    return self.mb


def load(folder: pathlib.Path) -> dict:
  """Loads into this process; what it took."""
  import jax
  import jax.numpy as jnp

  from dpo_jax.models import hf

  jax.devices()
  before, peak = status("RssAnon"), Peak()
  peak.start()
  begin = time.perf_counter()
  module, config = hf.read_config(folder)
  compute = module.Compute(param_dtype=jnp.bfloat16)
  abstract = jax.eval_shape(
    module.Model(config, compute).init_variables, jax.random.key(0)
  )
  read = []
  variables = hf.load_variables(
    folder, module.HF_NAMES, abstract, on_read=read.append
  )
  jax.block_until_ready(variables)
  found = {
    "seconds": time.perf_counter() - begin,
    "read_mb": sum(read) / 2**20,
    "before_mb": before,
    "anonymous_mb": peak.stop(),
    "VmHWM_mb": status("VmHWM"),
  }
  before, peak = status("RssAnon"), Peak()
  peak.start()
  begin = time.perf_counter()
  hf.save_checkpoint(f"{folder}-again", module, config, variables)
  return found | {
    "save_seconds": time.perf_counter() - begin,
    "save_mb": peak.stop() - before,
  }


def plain_read(folder: pathlib.Path) -> float:
  """Seconds to read the files into memory that holds them all."""
  begin = time.perf_counter()
  kept = [file.read_bytes() for file in folder.glob("*.safetensors")]
  seconds = time.perf_counter() - begin
  del kept
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=22)
  parser.add_argument("--shard_mb", type=int, default=500)
  parser.add_argument("--folder", type=pathlib.Path, help="kept, or written")
  parser.add_argument("--worker", action="store_true")
  args = parser.parse_args()
  if args.worker:
    print(json.dumps(load(args.folder)))
    return
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.folder or pathlib.Path(temporary) / "model"
    if not folder.exists():
      write(folder, args.layers, args.shard_mb * 2**20)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) / 2**20
    plain_read(folder)  # into the page cache
    plain = plain_read(folder)
    command = [sys.executable, __file__, "--worker", f"--folder={folder}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, capture_output=True, env=env)
    found = json.loads(done.stdout)
    print(
      f"{len(files)} files, {size:.0f} MB; plain read {plain:.1f} s\n"
      f"load {found['seconds']:.1f} s; bytes read {found['read_mb']:.0f} MB;"
      f" anonymous {found['before_mb']:.0f} -> {found['anonymous_mb']:.0f} MB"
      f" ({found['anonymous_mb'] / size:.2f} of the files); VmHWM"
      f" {found['VmHWM_mb']:.0f} MB ({found['VmHWM_mb'] / size:.2f})\n"
      f"save {found['save_seconds']:.1f} s, {found['save_mb']:.0f} MB more"
    )
    shutil.rmtree(f"{folder}-again")


if __name__ == "__main__":
  main()
