"""One live run in a work directory.

The leading process holds `running.json`: an flock on it, which the system
releases whatever happens to the process, and a heartbeat, for file systems on
which locks do not reach other machines.
"""

import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time

from dpo_jax.errors import ConfigError

_LOG = logging.getLogger("dpo_jax")
NAME = "running.json"
BEAT_SECONDS = 10.0
# Without a beat, whoever held it is dead; longer than file systems keep times.
STALE_SECONDS = 90.0


class Lock:
  """`with Lock(directory):` while a run lives in it."""

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    beat_seconds: float = BEAT_SECONDS,
    stale_seconds: float = STALE_SECONDS,
  ):
    """Takes nothing yet.

    Args:
      directory: exists.
      beat_seconds: between two signs of life.
      stale_seconds: for which the file of another machine is watched, where
        the lock on it can be had, before it counts as left by a dead run.
    """
    self.path = pathlib.Path(directory) / NAME
    self._beat = beat_seconds
    self._stale = stale_seconds
    self._file = None
    self._ended = threading.Event()

  def take(self) -> None:
    """Raises ConfigError, naming host and process, if a run lives there."""
    while True:
      # Not truncated before it is ours: it says whose it is.
      file = open(self.path, "a+b")  # noqa: SIM115
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.close()
        raise self._taken() from None
      except OSError:  # a file system without locks: the heartbeat decides
        locks = False
      else:
        locks = True
      owner = self._owner()
      here = owner and owner.get("host") == socket.gethostname()
      if owner and not (locks and here) and self._beats(file, owner):
        file.close()
        raise self._taken()
      if self._is(file):
        break
      file.close()  # its holder removed it in between
    self._file = file
    if owner:
      _LOG.info("%s was left by a run that died (%s)", self.path, _name(owner))
    self._write()
    threading.Thread(target=self._go_on_beating, daemon=True).start()

  def release(self) -> None:
    """Removes the file; nothing where it is not held."""
    if self._file is None:
      return
    self._ended.set()
    if self._is(self._file):
      self.path.unlink(missing_ok=True)
    self._file.close()
    self._file = None

  def __enter__(self) -> "Lock":
    self.take()
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.release()

  def _is(self, file) -> bool:
    """Whether the open file still has the name."""
    try:
      return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
    except FileNotFoundError:
      return False

  def _beats(self, file, owner: dict) -> bool:
    """Whether another machine is seen to touch the file; by our clock."""
    _LOG.info(
      "%s is of %s; looking for %.0f s whether it lives",
      self.path, _name(owner), self._stale,
    )  # fmt: skip
    before, begun = os.fstat(file.fileno()).st_mtime_ns, time.monotonic()
    while self._is(file) and time.monotonic() - begun < self._stale:
      time.sleep(min(1.0, self._stale / 10))
      if os.fstat(file.fileno()).st_mtime_ns != before:
        return True
    return False

  def _write(self) -> None:
    self._file.truncate(0)
    mine = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    self._file.write(json.dumps(mine).encode() + b"\n")
    self._file.flush()

  def _go_on_beating(self) -> None:
    file = self._file
    while not self._ended.wait(self._beat):
      try:
        os.utime(file.fileno())
      except OSError:  # of a file system that may come back
        continue
      except ValueError:  # closed
        return

  def _owner(self) -> dict | None:
    try:
      owner = json.loads(self.path.read_text())
    except (OSError, ValueError):
      return None
    return owner if isinstance(owner, dict) else None

  def _taken(self) -> ConfigError:
    owner = self._owner()
    who = _name(owner) if owner else "another process"
    return ConfigError(
      f"work directory {self.path.parent}: a run is going on in it ({who}); end"
      " that one, or take another directory"
    )


def _name(owner: dict) -> str:
  return (
    f"process {owner.get('pid')} on {owner.get('host')}, since"
    f" {owner.get('since')}"
  )
