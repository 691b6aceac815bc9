"""A sweep as a whole: its runs, where they go, and the command of each."""

import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_jax.errors import ConfigError
from dpo_jax.sweep.expand import SweepRun, flags_of
from dpo_jax.sweep.status import Place


class Sweep(NamedTuple):
  """Runs below one directory.

  runs/ID/    the work directory of each
  cache/      what all share: encoded data and log-probs of the reference, where
              the config names no folder for them, and compiled programs
  table.csv   a row a run; table.md, sweep.html: the same to read
  """

  root: pathlib.Path
  train: Sequence[str]  # the command that every run's begins with
  runs: Sequence[SweepRun]

  def place(self, run: SweepRun) -> Place:
    return Place(self.root / "runs" / run.id)

  def command(self, run: SweepRun) -> list[str]:
    """What to type to start, or continue, this run alone."""
    extra = {}
    if not run.config.data.cache_dir:
      extra["data.cache_dir"] = str(self.root / "cache")
    if run.config.log.wandb and not run.config.log.name:
      extra["log.name"] = run.id
    flags = flags_of(extra | run.overrides)
    workdir = f"--workdir={self.place(run).path}"
    return [*self.train, *flags, workdir]


class LocalOptions(NamedTuple):
  """How runs share this machine."""

  jobs: int = 1  # at a time
  gpus: tuple[str, ...] = ()  # one a run; none: JAX takes what it finds
  retries: int = 2  # of a run that crashed
  patience: float = 2.0  # seconds before a second try; doubled for a third

  def check(self) -> "LocalOptions":
    """Itself.

    Raises:
      ConfigError: a number that has no meaning.
    """
    if self.jobs < 1:
      raise ConfigError(f"--jobs={self.jobs} should be at least 1")
    if self.retries < 0:
      raise ConfigError(f"--retries={self.retries} should be at least 0")
    if self.gpus and self.jobs > len(self.gpus):
      raise ConfigError(
        f"--jobs={self.jobs} runs at a time have {len(self.gpus)} GPUs"
        f" (--gpus={','.join(self.gpus)}); each should have one of its own"
      )
    return self

  def environment(self, slot: int, root: pathlib.Path) -> dict[str, str]:
    """Variables of the run in a slot, beside those of the sweep itself."""
    # A run is one process here, also where the sweep is a task of a cluster.
    added = {"DPO_JAX_PROCESSES": "1"}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      added["JAX_COMPILATION_CACHE_DIR"] = str(root / "cache" / "programs")
    if self.gpus:
      added["CUDA_VISIBLE_DEVICES"] = self.gpus[slot]
    return added


def shell(command: Sequence[str], environment: Mapping[str, str]) -> str:
  """One line that a shell takes."""
  given = [f"{k}={shlex.quote(v)}" for k, v in environment.items()]
  return " ".join([*given, shlex.join(command)])
