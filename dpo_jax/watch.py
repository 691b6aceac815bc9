"""Eyes on a long run: a watchdog that says where it hangs, and traces."""

import contextlib
import faulthandler
import logging
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from dpo_jax.errors import ConfigError

_LOG = logging.getLogger("dpo_jax")


class Watchdog:
  """Writes all threads' stacks where nothing was heard of for too long.

  A thread of its own, so it works while the main one waits for a device, a
  disk or another host. It ends nothing: it writes, warns, and waits again.
  """

  def __init__(
    self, seconds: float, directory: str | os.PathLike, index: int = 0
  ):
    """Args:
    seconds: between two beats at most; 0 watches nothing.
    directory: where `stacks-INDEX.txt` is written.
    index: of this process.
    """
    self.path = pathlib.Path(directory) / f"stacks-{index}.txt"
    self._seconds = seconds
    self._lock = threading.Lock()
    self._over = threading.Event()
    self._heard, self._step = time.monotonic(), None
    self._thread: threading.Thread | None = None

  def beat(self, step: int) -> None:
    """Says that something was done, after that step."""
    with self._lock:
      self._heard, self._step = time.monotonic(), step

  def __enter__(self) -> "Watchdog":
    self._heard = time.monotonic()
    if self._seconds > 0:
      self._thread = threading.Thread(
        target=self._watch, name="watchdog", daemon=True
      )
      self._thread.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._over.set()
    if self._thread is not None:
      self._thread.join(5.0)  # it may hang in writing, too

  def _watch(self) -> None:
    left = self._seconds  # until it is time to look again
    while not self._over.wait(left):
      now = time.monotonic()
      with self._lock:
        heard, step = self._heard, self._step
      left = heard + self._seconds - now
      if left <= 0:
        self._report(now - heard, step)
        left = self._seconds

  def _report(self, seconds: float, step: int | None) -> None:
    since = "the start" if step is None else f"step {step}"
    silent = f"nothing for {seconds:.0f} s after {since}"
    try:
      with self.path.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {silent}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")
    except OSError as e:
      _LOG.warning("%s; stacks cannot be written: %s", silent, e)
    else:
      _LOG.warning("%s; all threads' stacks are in %s", silent, self.path)


def parse_steps(spec: str) -> tuple[int, int] | None:
  """First and last step of "20-22" or "20"; None for "".

  Raises:
    ConfigError: it is neither.
  """
  if not spec:
    return None
  match = re.fullmatch(r"(\d+)(?:-(\d+))?", spec, re.ASCII)
  first, last = (
    (int(x or match[1]) for x in match.groups()) if match else (0, 0)
  )
  if not 1 <= first <= last:
    raise ConfigError(
      f"config.log.trace={spec!r} should name a step or a range of steps, as"
      " in '20' or '20-22'"
    )
  return first, last


class Trace:
  """Profiles chosen steps, for XProf, TensorBoard and Perfetto.

  A profiler that fails is a warning; no run ends for it.
  """

  def __init__(
    self,
    spec: str,
    directory: str | os.PathLike,
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext,
  ):
    """Args:
    spec: steps, see `parse_steps`.
    directory: where the trace is written, of this process alone: files are
      named by host and second.
    around: entered while a trace is begun or written, which takes seconds.

    Raises:
      ConfigError: `spec` names no steps.
    """
    self.path = pathlib.Path(directory)
    self._spec, self._steps = spec, parse_steps(spec)
    self._around = around
    self._tried = self._runs = False

  def step(self, number: int, function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function, as that step; around those of the trace it waits for
    the device."""
    first, last = self._steps or (0, 0)
    if first <= number <= last and not self._tried:
      self._tried = True
      jax.block_until_ready(args)
      with self._around():
        self._runs = _try(jax.profiler.start_trace, self.path)
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      out = function(*args)
    if self._runs and number >= last:
      jax.block_until_ready(out)
      self._stop()
    return out

  def _stop(self) -> None:
    self._runs = False
    with self._around():
      written = _try(jax.profiler.stop_trace)
    if written:
      _LOG.info("trace of step %s: %s", self._spec, self.path)

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._runs:
      self._stop()


def _try(function: Callable[..., Any], *args: Any) -> bool:
  """Whether a call of the profiler went well."""
  try:
    function(*args)
  except Exception as e:
    _LOG.warning("config.log.trace: the profiler fails: %s", e)
    return False
  return True
