"""Named groups of arrays on disk: written whole or not at all, checked on read.

A group is a directory of `.npy` files and `report.json`, which holds the size
and CRC-32 of each file beside the caller's own values. Who makes a group holds
its lock meanwhile, so that others that need the same one wait and then read it.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_log = logging.getLogger("dpo_jax")

_REPORT = "report.json"
_PARTIAL = "part-"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)


def read(
  folder: str, key: str, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict] | None:
  """The arrays (memory-mapped) and values stored under `key`.

  None where there are none, or where they are damaged, with a warning.
  """
  path = pathlib.Path(folder) / key
  if not path.exists():
    return None
  try:
    return _read(path, names)
  except _DAMAGE as error:
    _log.warning("%s: damaged cache, will be rebuilt (%s)", path, error)
    return None


def _read(
  path: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict]:
  stored = json.loads((path / _REPORT).read_text(encoding="utf-8"))
  arrays = {}
  for name in names:
    file = path / f"{name}.npy"
    if _checksum(file) != stored["files"][name]:
      raise ValueError(f"{name}.npy is not what was written")
    arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
  return arrays, stored["values"]


def write(
  folder: str, key: str, arrays: Mapping[str, np.ndarray], values: dict
) -> None:
  """Stores arrays and JSON values under `key`, replacing what is there.

  A cache that cannot be written costs a warning and not the run.
  """
  final = pathlib.Path(folder) / key
  partial = None
  try:
    os.makedirs(folder, exist_ok=True)
    partial = pathlib.Path(
      tempfile.mkdtemp(prefix=f"{key}.{_PARTIAL}", dir=folder)
    )
    files = {}
    for name, array in arrays.items():
      np.save(partial / f"{name}.npy", array, allow_pickle=False)
      files[name] = _checksum(partial / f"{name}.npy")
    report = json.dumps({"files": files, "values": values}, indent=1)
    (partial / _REPORT).write_text(report + "\n", encoding="utf-8")
    partial.chmod(0o755)
    try:
      os.rename(partial, final)
    except OSError:
      # Another process wrote the same first, or what is there is damaged.
      try:
        _read(final, tuple(arrays))
      except _DAMAGE:
        shutil.rmtree(final)
        os.rename(partial, final)
  except OSError as error:
    if not final.exists():
      _log.warning("%s: cache not written (%s)", final, error.strerror)
  finally:
    if partial:
      shutil.rmtree(partial, ignore_errors=True)


def remove(folder: str, key: str) -> None:
  """Takes away what is stored under `key`; what cannot be removed stays."""
  shutil.rmtree(pathlib.Path(folder) / key, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: str, key: str) -> Iterator[None]:
  """Holds the lock of `key`, waiting for whoever has it.

  The system lets go of it when its process ends in whatever way, so no lock
  outlives its owner. What a killed writer left of `key` is removed. Where
  there can be no lock, there is none, and equal groups may be made twice.
  """
  with contextlib.ExitStack() as stack:
    try:
      os.makedirs(folder, exist_ok=True)
      stack.enter_context(_lock(pathlib.Path(folder) / f"{key}.lock"))
    except OSError as error:
      _log.info("%s: no lock on the cache (%s)", folder, error.strerror)
    else:
      for partial in pathlib.Path(folder).glob(f"{key}.{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
    yield


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        _log.info("%s: waiting for another run that makes it", path.stem)
        fcntl.flock(file, fcntl.LOCK_EX)
      # The one before may have removed the file that was waited for.
      if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
        break
    except BaseException:
      os.close(file)
      raise
    os.close(file)
  try:
    yield
  finally:
    path.unlink(missing_ok=True)
    os.close(file)


def _checksum(path: pathlib.Path) -> list[int]:
  """[bytes, CRC-32] of a file."""
  crc = size = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 20):
      crc = zlib.crc32(block, crc)
      size += len(block)
  return [size, crc]
