"""A child process with one variant, which takes steps when it is told to.

  python -m benchmarks.worker VARIANT PROBLEM_JSON WEIGHTS_FOLDER DEVICE

Lines on stdin: "step", "trace FOLDER" (a step under JAX's profiler), "trim"
(forget the memory peak), anything else ends it. Lines on stdout: one JSON
object after each, with CPU and wall seconds since the line before, and memory.
"""

import functools
import importlib
import json
import os
import resource
import sys
import time

from benchmarks.problem import Problem

# Name -> module, function, options.
VARIANTS = {
  "ours": ("jax_steps", "ours", {}),
  "ours_precomputed": ("jax_steps", "ours", {"precomputed": True}),
  "no_remat": ("jax_steps", "ours", {"remat": "none"}),
  "ours_remat": ("jax_steps", "ours", {"remat": "block"}),
  "no_skip": ("jax_steps", "ours", {"skip_prompts": False}),
  "no_sweep": ("jax_steps", "ours", {"place_sweep": None}),
  "no_skip_no_sweep": (
    "jax_steps",
    "ours",
    {"skip_prompts": False, "place_sweep": None},
  ),
  "no_blocks": ("jax_steps", "ours", {"attention": "dense"}),
  "concat": ("jax_steps", "concat", {}),
  "concat_blockwise": ("jax_steps", "concat", {"attention": "blockwise"}),
  "concat_minimal": ("jax_steps", "concat", {"remat": "minimal"}),
  "trl": ("trl_step", "trl", {}),
  "trl_remat": ("trl_step", "trl", {"checkpointing": True}),
  "tunix": ("tunix_step", "tunix", {}),
  "easydel": ("easydel_step", "easydel_step", {}),
}
# What a module needs beside JAX, and what its variants do not have.
NEEDS = {"trl_step": "trl", "tunix_step": "tunix", "easydel_step": "easydel"}


def main(variant: str, problem: str, path: str, device: str) -> None:
  # Libraries print; the protocol gets a stream of its own.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  module, function, options = VARIANTS[variant]
  if module == "trl_step":
    options = options | {"device": device}
  function = getattr(importlib.import_module(f"benchmarks.{module}"), function)
  problem = Problem(**json.loads(problem))
  functools.partial(function, **options)(problem, path, _Turns(answers))


class _Turns:
  """Called between steps: answers for the last one, waits for the next."""

  def __init__(self, answers):
    self._answers = answers
    self._trace = ""
    self._since = _clock()

  def __call__(self, row: dict) -> None:
    now = _clock()
    row |= {k: now[k] - self._since[k] for k in now}
    if self._trace:
      row["trace"] = _traced(self._trace)
      self._trace = ""
    while True:
      row |= _memory()
      print(json.dumps(row), file=self._answers)
      command = sys.stdin.readline().strip()
      if command != "trim":
        break
      _forget_peak()
      row = {}
    if command.startswith("trace "):
      self._trace = command.partition(" ")[2]
      _start_trace(self._trace)
    elif command != "step":
      os._exit(0)  # libraries' own shutdown is not ours to wait for
    self._since = _clock()


def _start_trace(folder):
  import jax

  jax.profiler.start_trace(folder)


def _traced(folder):
  import jax

  from benchmarks.trace import summary

  jax.profiler.stop_trace()
  return summary(folder)


def _clock() -> dict[str, float]:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return {
    "cpu": usage.ru_utime + usage.ru_stime,
    "wall": time.perf_counter(),
  }


def _memory() -> dict[str, float]:
  """Resident and peak resident MB of this process."""
  found = {}
  with open("/proc/self/status") as file:
    for line in file:
      key, _, value = line.partition(":")
      if key in ("VmRSS", "VmHWM"):
        found[key] = int(value.split()[0]) / 1000
  return {"rss": found["VmRSS"], "peak": found["VmHWM"]}


def _forget_peak() -> None:
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")


if __name__ == "__main__":
  main(*sys.argv[1:])
