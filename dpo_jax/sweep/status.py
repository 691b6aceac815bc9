"""What became of a run, read from its directory."""

import enum
import json
import os
import signal
import socket
import time
from typing import Any

from dpo_jax.processes import STOPPED
from dpo_jax.sweep.claims import is_live
from dpo_jax.workdir import Workdir

# Exit status of a run: one line on stderr says what, again would be the same.
BAD_INPUT = 2
_ATTEMPTS = "attempts.jsonl"


class State(enum.Enum):
  """Of a run, by what lies in its directory."""

  NEW = "never started"
  STOPPED = "stopped"  # or killed; it goes on from its newest checkpoint
  RUNNING = "running"
  FAILED = "failed"
  DONE = "done"


class Place(Workdir):
  """The directory of a run of a sweep: two files more than a run has alone.

  log.txt         what the run printed, all attempts one after another
  attempts.jsonl  when each began and how it ended
  """

  def __init__(self, path: str | os.PathLike):
    super().__init__(path)
    self.log = self.path / "log.txt"
    self.attempts = self.path / _ATTEMPTS

  def state(self) -> State:
    """What the files say; running as far as locks on them reach."""
    if self.complete():
      return State.DONE
    if is_live(self.path):
      return State.RUNNING
    attempts = self.read_attempts()
    if attempts and _failed(attempts[-1]):
      return State.FAILED
    return State.STOPPED if attempts or self.step() else State.NEW

  def complete(self) -> bool:
    """Whether the run came to its end, which it writes its summary at."""
    return self.summary.exists()

  def step(self) -> int:
    """Of the newest checkpoint; 0 without one."""
    if not self.checkpoints.is_dir():
      return 0
    names = [path.name for path in self.checkpoints.iterdir()]
    return max([int(n) for n in names if n.isdecimal()], default=0)

  def begin_attempt(self) -> None:
    where = {"host": socket.gethostname(), "pid": os.getpid()}
    self._note(event="begun", step=self.step(), **where)

  def end_attempt(self, status: int) -> None:
    """Notes the exit status, or minus the signal that ended it."""
    done = self.complete()
    self._note(event="ended", step=self.step(), status=status, done=done)

  def read_attempts(self) -> list[dict[str, Any]]:
    """Rows of attempts.jsonl; one that a kill cut short is left out."""
    rows = []
    if self.attempts.exists():
      for line in self.attempts.read_text(encoding="utf-8").splitlines():
        try:
          rows.append(json.loads(line))
        except ValueError:
          continue
    return rows

  def last_line(self) -> str:
    """Of the log: what a run that was refused says."""
    if not self.log.exists():
      return ""
    with self.log.open("rb") as file:
      file.seek(max(0, self.log.stat().st_size - 4000))
      lines = file.read().decode(errors="replace").split("\n")
    return next((x.strip() for x in reversed(lines) if x.strip()), "")

  def _note(self, **values: Any) -> None:
    row = {"time": round(time.time(), 3)} | values
    with self.attempts.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")


def was_stopped(status: int, complete: bool) -> bool:
  """Whether a run that ended so may go on: it was asked to stop, with its
  checkpoint saved (75, or 0 without a summary) or before it could save one."""
  ended_early = status == 0 and not complete
  return ended_early or status in (STOPPED, -signal.SIGTERM, -signal.SIGINT)


def _failed(attempt: dict[str, Any]) -> bool:
  if attempt.get("event") != "ended":
    return False
  return not was_stopped(attempt["status"], attempt["done"])
