"""Standard output and error whose readers may leave: `train.py | head -1`."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Unread(BrokenPipeError):
  """Whoever read this stream has seen enough."""


class _Stream:
  """A stream that, once its reader has left, says so or drops the rest."""

  def __init__(self, stream: TextIO, goes_on: bool):
    self._stream = stream
    self._goes_on = goes_on

  def __eq__(self, other: object) -> bool:
    """absl writes to its own stream and to `sys.stderr`, where they differ."""
    return other is self or other is self._stream

  def __hash__(self) -> int:
    return hash(self._stream)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._heard():
      return self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._heard():
      self._stream.flush()

  @contextlib.contextmanager
  def _heard(self) -> Iterator[None]:
    try:
      yield
    except BrokenPipeError as e:
      _silence(self._stream)
      if not self._goes_on:
        raise Unread from e
    except OSError:  # a disk that is full may have room again
      if not self._goes_on:
        raise


@contextlib.contextmanager
def watched(*, goes_on: bool) -> Iterator[None]:
  """Inside, standard error takes whatever is written also once its reader has
  left, or where it was closed from the start; and standard output does, or
  raises `Unread`.

  Args:
    goes_on: whether it does.
  """
  before = {name: getattr(sys, name) for name in ("stderr", "stdout")}
  with contextlib.ExitStack() as stack:
    for name, stream in before.items():
      if stream is None:
        stream = stack.enter_context(open(os.devnull, "w"))
      setattr(sys, name, _Stream(stream, goes_on or name == "stderr"))
    try:
      yield
    finally:
      for name, stream in before.items():
        setattr(sys, name, stream)
        if stream is not None and (goes_on or name == "stderr"):
          try:
            stream.flush()
          except OSError:
            _silence(stream)


def _silence(stream: TextIO) -> None:
  """Sends what is written from now on, and what is buffered, nowhere. Python
  would otherwise try once more at its end, and make that its exit status."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, stream.fileno())
  os.close(nowhere)
