"""Runs of a sweep on this machine, some at a time."""

import collections
import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Iterator

from dpo_jax.sweep.child import Child
from dpo_jax.sweep.claims import claim
from dpo_jax.sweep.expand import SweepRun
from dpo_jax.sweep.options import LocalOptions, Sweep
from dpo_jax.sweep.status import BAD_INPUT, Place, was_stopped

_LOG = logging.getLogger("dpo_jax")
_TICK = 0.1  # seconds between looks at the processes
_BUSY = 1.0  # seconds until a run that another process has is tried again
_SAME_SIGNAL = 1.0  # seconds in which a scheduler may send one signal twice


@dataclasses.dataclass
class _Job:
  run: SweepRun
  place: Place
  failures: int = 0
  due: float = 0.0  # time.monotonic() before which it is not started
  busy: bool = False  # another process had it when last tried
  child: Child | None = None


def run_local(sweep: Sweep, options: LocalOptions) -> bool:
  """Brings every run to its end: skips those done, continues those stopped.

  A run that was stopped or preempted, and had come further, is continued; one
  that crashed, or came no further, is tried again `options.retries` times; one
  that was refused is not. What another sweep of the same directory is running
  is waited for. SIGTERM and SIGINT stop all runs, with their checkpoints saved;
  a second one ends them at once.

  Returns:
    Whether it was asked to stop.
  """
  jobs = [_Job(run, sweep.place(run)) for run in sweep.runs]
  waiting = collections.deque(j for j in jobs if not j.place.complete())
  if done := len(jobs) - len(waiting):
    _LOG.info("%d of %d runs are done already", done, len(jobs))
  active: dict[int, _Job] = {}
  with _signals(active) as stop:
    while active or (waiting and not stop.times):
      for slot, job in list(active.items()):
        status = job.child.poll()
        if status is not None:
          del active[slot]
          if _goes_on(job, status, options, stopping=bool(stop.times)):
            waiting.append(job)
      free = [slot for slot in range(options.jobs) if slot not in active]
      while free and not stop.times and (job := _next(waiting)):
        if _start(sweep, job, options, free[0]):
          active[free.pop(0)] = job
          if stop.times:  # it came while the process started
            job.child.stop(stop.times)
        elif job.busy:
          waiting.append(job)
      time.sleep(_TICK)
  return bool(stop.times)


def _next(waiting: collections.deque[_Job]) -> _Job | None:
  """Takes the first that is due."""
  now = time.monotonic()
  for job in waiting:
    if job.due <= now:
      waiting.remove(job)
      return job
  return None


def _start(sweep: Sweep, job: _Job, options: LocalOptions, slot: int) -> bool:
  """Starts a run, unless another process has it or has done it meanwhile."""
  taken = claim(job.place.path)
  if taken is None:
    if not job.busy:
      _LOG.info("%s: running in another process, waiting", job.run.id)
    job.busy, job.due = True, time.monotonic() + _BUSY
    return False
  job.busy = False
  if job.place.complete():
    taken.release()
    return False
  step = job.place.step()
  _LOG.info("%s: %s", job.run.id, f"continues at {step}" if step else "starts")
  environment = options.environment(slot, sweep.root)
  job.child = Child(sweep.command(job.run), job.place, taken, environment)
  return True


def _goes_on(
  job: _Job, status: int, options: LocalOptions, stopping: bool
) -> bool:
  """Whether a run that ended is to be started again."""
  name, place = job.run.id, job.place
  if place.complete():
    _LOG.info("%s: done%s", name, f", but {_ended(status)}" if status else "")
    return False
  if was_stopped(status, complete=False):
    _LOG.info("%s: stopped at step %d", name, place.step())
    if stopping:
      return False
    if place.step() > job.child.first_step:
      job.due = time.monotonic() + options.patience
      return True
  else:
    _LOG.warning("%s: %s: %s", name, _ended(status), place.last_line())
  if status == BAD_INPUT or stopping:
    return False
  job.failures += 1
  if job.failures > options.retries:
    _LOG.warning("%s: given up; its log is %s", name, place.log)
    return False
  job.due = time.monotonic() + options.patience * 2 ** (job.failures - 1)
  return True


def _ended(status: int) -> str:
  if status >= 0:
    return f"failed with status {status}"
  return f"ended by {signal.Signals(-status).name}"


class _Stop:
  """Counts requests; one that comes twice within a moment is one."""

  def __init__(self, active: dict[int, _Job]):
    self.times, self._last, self._active = 0, -_SAME_SIGNAL, active

  def caught(self, number: int, frame: object) -> None:
    now = time.monotonic()
    if now - self._last < _SAME_SIGNAL:
      return
    self._last, self.times = now, self.times + 1
    what = "ending" if self.times > 1 else "stopping"
    count = len(self._active)
    _LOG.warning("%s: %s %d runs", signal.Signals(number).name, what, count)
    for job in list(self._active.values()):
      job.child.stop(self.times)


@contextlib.contextmanager
def _signals(active: dict[int, _Job]) -> Iterator[_Stop]:
  stop = _Stop(active)
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {n: signal.signal(n, stop.caught) for n in numbers}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
