"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib

from dpo_jax.errors import DataError


def write_whole(path: str | os.PathLike, content: bytes | str) -> None:
  """Gives a file its name once all of it is on the disk; until then, and after
  an error, what had the name before has it.

  Args:
    path: of the file; its folder exists.
    content: of the file; text becomes UTF-8.

  Raises:
    DataError: it cannot be written, as on a disk that is full.
  """
  path = pathlib.Path(path)
  part = path.with_name(path.name + ".part")
  if isinstance(content, str):
    # Lone surrogates, which JSON can carry and UTF-8 cannot, become "?".
    content = content.encode("utf-8", errors="replace")
  try:
    with part.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())  # or a lost machine leaves a name and no text
    part.replace(path)
  except OSError as e:
    with contextlib.suppress(OSError):
      part.unlink()
    raise cannot_write(path, e) from e


def cannot_write(path: str | os.PathLike, error: OSError) -> DataError:
  """The one sentence for what a disk refuses."""
  return DataError(f"{path}: cannot be written: {error.strerror or error}")
