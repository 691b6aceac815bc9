"""Runs of scripts/train.py in processes of their own, to be treated badly."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from dpo_jax.metrics import CLOCKED
from dpo_jax.stored import read_meta
from dpo_jax.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Half of the time to compile; the bits of ten steps are those without it.
QUICKLY = "--xla_backend_optimization_level=1"
TINY = ROOT / "tests" / "faults" / "tiny.py"
# Of two processes, long enough to be stopped and killed on the way.
STEPS_OF_TWO = "--config.train.steps=40"


class Running:
  """The processes of one run, and what each of them has printed."""

  def __init__(self, processes, logs, workdir):
    self.processes = processes
    self.logs = logs
    self.workdir = pathlib.Path(workdir)

  def log(self, process=0) -> str:
    return self.logs[process].read_text(errors="replace")

  def wait(self, seconds=120) -> list[int]:
    """Exit statuses; negative: ended by that signal."""
    ends = time.monotonic() + seconds
    try:
      return [p.wait(max(ends - time.monotonic(), 0.1)) for p in self.processes]
    except subprocess.TimeoutExpired:
      self.kill()
      raise AssertionError(
        f"not over after {seconds} s:\n" + self.log()[-3000:]
      ) from None

  def kill(self, process=None, number=signal.SIGKILL) -> None:
    """Sends a signal to one process, or to all."""
    some = self.processes if process is None else [self.processes[process]]
    for one in some:
      with contextlib.suppress(ProcessLookupError):
        one.send_signal(number)

  def until(self, pattern, process=0, seconds=120) -> None:
    """Waits until the process has printed that."""
    ends = time.monotonic() + seconds
    while not re.search(pattern, self.log(process)):
      assert time.monotonic() < ends, self.log(process)[-3000:]
      assert self.processes[process].poll() is None, (
        f"ended with {self.processes[process].poll()} and not"
        f" {pattern!r}:\n" + self.log(process)[-3000:]
      )
      time.sleep(0.05)

  def until_saved(self, step, seconds=120) -> None:
    """Waits until a checkpoint of that step, or a later one, is complete."""
    ends = time.monotonic() + seconds
    while max(saved(self.workdir), default=-1) < step:
      assert time.monotonic() < ends, self.log()[-3000:]
      assert self.processes[0].poll() is None, self.log()[-3000:]
      time.sleep(0.02)


def launch(
  corpus,
  workdir,
  *flags,
  processes=0,
  devices=1,
  heartbeat=10,
  cache=None,
  fault="",
  workdirs=None,
  last=(),
  unread=False,
) -> Running:
  """Starts a run on a corpus and returns at once.

  Args:
    corpus: folder of `write_corpus`.
    workdir: of the run.
    flags: further ones.
    processes: 0 is a plain run; from 1 on they meet over loopback.
    devices: of each process.
    heartbeat: seconds after which a dead one is noticed.
    cache: folder of compiled programs to share.
    fault: see `faulty_train`.
    workdirs: names beside `workdir`, one for each process, instead of it.
    last: further flags of the last process.
    unread: nobody reads what it prints, as after `| head`; no logs.
  """
  script = ROOT / "scripts" / "train.py"
  if fault or processes > 1:
    script = ROOT / "tests" / "faults" / "faulty_train.py"
  workdir = pathlib.Path(workdir)
  logs = workdir.with_name(workdir.name + ".logs")
  logs.mkdir(parents=True, exist_ok=True)
  attempt = len(list(logs.iterdir()))
  env = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "FAULT": fault or "none 0 0",
  }
  env.pop("PYTHONDONTWRITEBYTECODE", None)  # a hundred runs read our modules
  if cache:
    env |= {
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
  port = free_port()
  started, files = [], []
  for i in range(max(processes, 1)):
    command = [
      sys.executable, str(script), f"--config={TINY}:{corpus}",
      f"--workdir={workdir.with_name(workdirs[i]) if workdirs else workdir}",
      *flags,
    ]  # fmt: skip
    if processes:
      command += [
        f"--coordinator=127.0.0.1:{port}", f"--processes={processes}",
        f"--process={i}", f"--heartbeat_seconds={heartbeat}",
      ]  # fmt: skip
      command += last if i == processes - 1 else ()
    files.append(logs / f"{attempt}-{i}.txt")
    with _closed_pipe() if unread else files[-1].open("w") as out:
      started.append(
        subprocess.Popen(
          command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT
        )
      )
  return Running(started, files, workdir)


def _closed_pipe():
  """The end to write into of a pipe whose other end was closed."""
  read, write = os.pipe()
  os.close(read)
  return os.fdopen(write, "w")


def saved(workdir) -> list[int]:
  """Steps of the complete checkpoints."""
  place = pathlib.Path(workdir) / "checkpoints"
  if not place.is_dir():
    return []
  return sorted(int(p.name) for p in place.iterdir() if p.name.isdigit())


def checksums(workdir) -> dict[str, str]:
  """Of every array of the last state, as its checkpoint has them."""
  place = pathlib.Path(workdir) / "checkpoints"
  return read_meta(place, saved(workdir)[-1])["checksums"]


def rows(workdir) -> list[dict]:
  """Of metrics.jsonl, without what the clock decides."""
  return [
    {k: v for k, v in row.items() if k not in CLOCKED}
    for row in read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
  ]


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]
