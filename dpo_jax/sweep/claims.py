"""One process at a time in a run's directory, however many sweeps there are."""

import fcntl
import os
import pathlib

from dpo_jax import lock

_FILE = ".claim"


class Claim:
  """A lock on the directory of a run.

  It belongs to an open file, which the run's process inherits: it holds until
  the sweep and the run have both let go or died, so that a run that outlives
  its sweep by a moment is not started beside itself.
  """

  def __init__(self, file: int):
    self.file = file

  def release(self) -> None:
    os.close(self.file)


def claim(directory: pathlib.Path) -> Claim | None:
  """Takes the directory, making it where there is none; None if a run goes on
  in it."""
  directory.mkdir(parents=True, exist_ok=True)
  file = os.open(directory / _FILE, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(file)
    return None
  if _is_locked(directory / lock.NAME):
    os.close(file)
    return None
  return Claim(file)


def is_live(directory: pathlib.Path) -> bool:
  """Whether a run goes on in it, as far as locks reach: one that a sweep has
  claimed, or one that was started otherwise and holds the directory itself.
  Takes nothing."""
  return any(_is_locked(directory / name) for name in (_FILE, lock.NAME))


def _is_locked(path: pathlib.Path) -> bool:
  try:
    file = os.open(path, os.O_RDONLY)
  except FileNotFoundError:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  finally:
    os.close(file)
  return False
