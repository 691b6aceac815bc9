"""Named groups of arrays on disk: written whole or not at all, checked on read.

A group is a directory of `.npy` files and `report.json`, which holds the size
and CRC-32 of each file beside the caller's own values.
"""

import json
import logging
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

_log = logging.getLogger("dpo_jax")

_REPORT = "report.json"


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
    stored = json.loads((path / _REPORT).read_text(encoding="utf-8"))
    arrays = {}
    for name in names:
      file = path / f"{name}.npy"
      if _checksum(file) != stored["files"][name]:
        raise ValueError(f"{name}.npy is not what was written")
      arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
    return arrays, stored["values"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    _log.warning("%s: damaged cache, will be rebuilt (%s)", path, error)
    return None


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
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))
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
      if final.exists() and read(folder, key, tuple(arrays)) is None:
        shutil.rmtree(final)
        os.rename(partial, final)
  except OSError as error:
    if not final.exists():
      _log.warning("%s: cache not written (%s)", final, error.strerror)
  finally:
    if partial:
      shutil.rmtree(partial, ignore_errors=True)


def _checksum(path: pathlib.Path) -> list[int]:
  """[bytes, CRC-32] of a file."""
  crc = size = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 20):
      crc = zlib.crc32(block, crc)
      size += len(block)
  return [size, crc]
