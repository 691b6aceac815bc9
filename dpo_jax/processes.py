"""Many processes of one run: how they start, agree, stop and end.

The engine is JAX's own multi-controller runtime. Every process runs the same
program on the same numbers; the first, the leader, writes the files.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.errors import ConfigError, UserError

_LOG = logging.getLogger("dpo_jax")
_AGAIN = 1.0  # seconds in which one request to stop may arrive twice


def start(
  coordinator: str = "",
  processes: int = 0,
  process: int | None = None,
  *,
  heartbeat_seconds: int = 100,
) -> None:
  """Joins the other processes of the run; before anything else of JAX.

  Args:
    coordinator: "host:port" of the first process. On SLURM, GKE and Cloud TPU
      this and the next two are found without being given.
    processes: how many there are. 1 without a coordinator is a run of one
      process also where a cluster is found.
    process: which of them this one is, from 0.
    heartbeat_seconds: after so long without a sign of life from one process
      the others end themselves.

  Raises:
    ConfigError: only some of the three are given, or the others never came.
  """
  given = {
    "coordinator": coordinator or None,
    "processes": processes or None,
    "process": process,
  }
  if processes == 1 and not coordinator:
    return
  missing = [name for name, value in given.items() if value is None]
  if len(missing) in (1, 2):
    raise ConfigError(
      f"--{' and --'.join(missing)} missing: a run of many processes is told"
      " --coordinator, --processes and --process together (or, on SLURM, GKE"
      " and Cloud TPU, none of them)"
    )
  if coordinator and not coordinator.rpartition(":")[2].isdigit():
    raise ConfigError(f"--coordinator={coordinator} should be host:port")
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      process,
      heartbeat_timeout_seconds=heartbeat_seconds,
      # A process that failed must not wait for those that wait for it.
      shutdown_timeout_seconds=heartbeat_seconds,
    )
  except ValueError as e:
    if missing and "should be defined" in str(e):
      return  # no cluster here: one process
    raise ConfigError(f"starting the processes: {e}") from e
  except RuntimeError as e:  # nobody at the address, or the port is taken
    raise ConfigError(f"starting the processes: {e}") from e


def count() -> int:
  return jax.process_count()


def number() -> int:
  return jax.process_index()


def leads() -> bool:
  """Whether this process is the one that writes."""
  return number() == 0


def wait(name: str) -> None:
  """Returns once all processes have come here."""
  if count() > 1:
    multihost_utils.sync_global_devices(name)


def all_agree(good: bool) -> bool:
  """Whether it is so in every process; all of them must ask."""
  if count() == 1:
    return good
  return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def lead(decide: Callable[[], Any]) -> Any:
  """What `decide` returns in the leader, in every process; JSON only.

  Raises:
    UserError: in every process, of the class that it was raised in the leader.
  """
  if count() == 1:
    return decide()
  told, error = {}, None
  if leads():
    try:
      told = {"value": decide()}
    except UserError as e:
      error = e
      told = {"error": str(e), "kind": type(e).__name__}
  told = json.loads(_broadcast(json.dumps(told)))
  if error:
    raise error
  if "error" in told:
    raise _kinds(UserError).get(told["kind"], UserError)(told["error"])
  return told["value"]


def _kinds(kind: type[UserError]) -> dict[str, type[UserError]]:
  found = {kind.__name__: kind}
  for below in kind.__subclasses__():
    found |= _kinds(below)
  return found


def share(tree: Any) -> Any:
  """The leader's numpy arrays in every process, each of which gives a tree of
  the same shapes and dtypes."""
  if count() == 1:
    return tree
  return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def gather(tree: Any) -> Any:
  """A tree of arrays, however they lie, as numpy arrays in every process."""

  def one(array):
    alone = isinstance(array, np.ndarray) or array.is_fully_addressable
    if alone or array.is_fully_replicated:
      return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)

  return jax.tree.map(one, tree)


def end(status: int) -> None:
  """Ends this process and says so to the others.

  One of many that fails must not wait for the rest, which wait for it: it goes
  at once, and its missing heartbeat ends them. One that was stopped may have
  been in the middle of a compilation, and the threads of that do not survive
  the end of the interpreter.
  """
  many = jax.distributed.is_initialized()
  if status != STOPPED and not many:
    sys.exit(status)
  sys.stdout.flush()
  sys.stderr.flush()
  if status == 2 and leads():
    time.sleep(2)  # what all were told all should get to say
  if status == STOPPED and many:
    jax.distributed.shutdown()
  os._exit(status)


# Exit status of a run that was asked to stop and can be continued: sysexits'
# EX_TEMPFAIL, so that schedulers can tell it from success and from failure.
STOPPED = 75


class Stopped(BaseException):  # or what guards against any error caught it
  """A signal asked the run to stop; the same command continues it."""


class StopSignal:
  """What SIGTERM and SIGINT do to a run, inside `with StopSignal() as stop:`.

  One process: they raise `Stopped`, but within `with stop.between_steps():`
  they only make `stop.requested()` true, and a second one, a while later,
  acts as if nobody had caught it. Many: JAX tells all processes of a SIGTERM
  to one, and the question is answered alike at the same call, so all must ask
  it at the same points; outside of steps, and at a second SIGTERM, they go on.
  """

  def __init__(self):
    self._caught_at: float | None = None
    self._waits = False
    self._before: dict[int, Any] = {}
    self._asked = 0

  @contextlib.contextmanager
  def between_steps(self) -> Iterator[None]:
    self._waits = True
    try:
      yield
    finally:
      self._waits = False

  def requested(self) -> bool:
    """Whether to save and stop here."""
    if count() == 1:
      return self._caught_at is not None
    self._asked += 1
    return multihost_utils.reached_preemption_sync_point(self._asked)

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      # With many processes SIGTERM is JAX's, which catches it below Python.
      mine = (signal.SIGINT,) if count() > 1 else _SIGNALS
      for one in mine:
        self._before[one] = signal.signal(one, self._caught)
    return self

  def __exit__(self, *exc_info: object) -> None:
    for one, handler in self._before.items():
      signal.signal(one, handler)
    self._before = {}

  def _caught(self, one: int, frame: Any) -> None:
    now, first = time.monotonic(), self._caught_at
    if first is None:
      self._caught_at = now
      name = signal.Signals(one).name
      if count() > 1:
        signal.raise_signal(signal.SIGTERM)
      elif not self._waits:
        raise Stopped(f"{name}: stopped between saves; the same command"
                      " continues")  # fmt: skip
      _LOG.warning("%s: saving after this step; once more ends at once", name)
    elif now - first > _AGAIN:  # schedulers may deliver one request twice
      self.__exit__()
      if count() > 1:
        os._exit(128 + one)
      if signal.getsignal(one) is signal.SIG_IGN:  # as in a shell's background
        signal.signal(one, signal.SIG_DFL)
      signal.raise_signal(one)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _broadcast(text: str) -> str:
  """The leader's text in every process."""
  own = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
  padded = np.zeros(size, np.uint8)
  if leads():
    padded[:] = own
  return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()
