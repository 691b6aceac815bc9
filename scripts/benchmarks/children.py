"""Runs variants in processes of their own, and sums up what they say."""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.problem import Problem
from benchmarks.worker import NEEDS, VARIANTS

SCRIPTS = pathlib.Path(__file__).resolve().parents[1]
# It must stand before the backend starts. Without it XLA:CPU keeps far more
# temporaries alive, in all JAX variants.
XLA_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
COMPARED = 3  # first losses
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


class Failed(Exception):
  """A variant's process ended; says how."""


class Where(NamedTuple):
  """What variants run on."""

  device: str = "cpu"  # or "gpu", "tpu"
  cores: frozenset[int] | None = None  # to pin to; None does not pin
  threads: int = 0  # of the CPU; 0: as many as a library likes
  # Of variants that live in another environment, by name.
  pythons: Mapping[str, str] = {}

  def python(self, variant: str) -> str:
    return self.pythons.get(variant.partition("@")[0], sys.executable)

  def environment(self, checkout: str = "") -> dict[str, str]:
    env = dict(os.environ)
    env |= {
      "JAX_PLATFORMS": _PLATFORMS[self.device],
      "PYTHONPATH": f"{SCRIPTS}{os.pathsep}{checkout or SCRIPTS.parent}",
      "TOKENIZERS_PARALLELISM": "false",
      "HF_HUB_OFFLINE": "1",
    }
    # All but a little, of which the allocator knows the peak.
    env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.94"
    if self.device == "cpu":
      env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {XLA_FLAGS}"
      if self.threads == 1:
        env["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
    if self.threads:
      names = "OMP_NUM_THREADS", "MKL_NUM_THREADS"
      env |= dict.fromkeys(names, str(self.threads))
    return env


class Child:
  """One variant in its process; `step()` takes one training step there."""

  def __init__(
    self, variant: str, problem: Problem, path: str, where: Where
  ) -> None:
    self.variant, self.problem = variant, problem
    self.rows: list[dict] = []
    self.trace: dict | None = None
    name, _, checkout = variant.partition("@")
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    with _pinned(where.cores):  # which a child inherits
      self._process = subprocess.Popen(
        [
          where.python(variant), "-m", "benchmarks.worker", name,
          json.dumps(dataclasses.asdict(problem)), path, where.device,
        ],
        env=where.environment(checkout), text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        cwd="/",
      )  # fmt: skip
    self.ready = self._answer()

  def warm(self) -> None:
    """One step of every batch that is not counted."""
    self.turn()
    self._ask("trim")

  def turn(self) -> None:
    """One step of every batch."""
    for _ in range(self.problem.batches):
      self.step()

  def step(self) -> None:
    self.rows.append(self._ask("step"))

  def traced_step(self, folder: str) -> None:
    """A step that is not counted, under the profiler."""
    self.trace = self._ask(f"trace {folder}").get("trace")

  def close(self) -> None:
    self._process.communicate("end\n")

  def summary(self) -> dict:
    """Medians over turns, of seconds a step; memory in MB; first losses."""
    problem, n = self.problem, self.problem.batches
    timed = self.rows[n:]
    turns = [timed[i : i + n] for i in range(0, len(timed), n)]
    found = {"variant": self.variant, "steps": len(timed)}
    for kind in ("cpu", "wall"):
      means = [statistics.mean(row[kind] for row in turn) for turn in turns]
      seconds = statistics.median(means)
      found |= {
        f"{kind}_seconds": seconds,
        f"{kind}_seconds_lowest": min(means),
        f"{kind}_seconds_highest": max(means),
        f"pairs_per_{kind}_second": problem.pairs / seconds,
        f"tokens_per_{kind}_second": problem.tokens / seconds,
      }
    peaks = [row.get("device_peak") for row in self.rows]
    return found | {
      "device": self.ready.get("device"),
      "shapes": self.ready.get("shapes"),
      "temp_mb": _mb(self.ready.get("temp_bytes")),
      "planned_mb": _mb(self.ready.get("planned_bytes")),
      "device_peak_mb": _mb(max((p for p in peaks if p), default=None)),
      "peak_rss_mb": timed[-1]["peak"],
      "losses": [row["loss"] for row in self.rows[:COMPARED]],
      "logps": [row.get("logps") for row in self.rows[:COMPARED]],
      "trace": self.trace,
    }

  def _ask(self, command):
    with contextlib.suppress(BrokenPipeError):  # why it ended is in its log
      self._process.stdin.write(command + "\n")
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      raise Failed(f"{self.variant} ended:\n{self._log.read()[-4000:]}")
    return json.loads(line)


def save_weights(
  problem: Problem, variants: Sequence[str], path: str, where: Where
) -> str:
  """Weights for all variants, in the folder that is returned; none ("") where
  all can draw the same ones."""
  modules = {VARIANTS[v.partition("@")[0]][0] for v in variants}
  if not modules & NEEDS.keys():
    return ""
  subprocess.run(
    [
      sys.executable, "-c",
      "import sys, json; from benchmarks.problem import Problem;"
      "Problem(**json.loads(sys.argv[1])).save_weights(sys.argv[2])",
      json.dumps(dataclasses.asdict(problem)), f"{path}/model",
    ],
    check=True,
    env=where.environment(),
  )  # fmt: skip
  return f"{path}/model"


@contextlib.contextmanager
def _pinned(cores: frozenset[int] | None) -> Iterator[None]:
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores or before)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def _mb(n: float | None) -> float | None:
  return None if n is None else n / 1e6
