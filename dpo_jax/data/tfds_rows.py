"""Rows of datasets prepared by TFDS, read as array_record without TensorFlow.

TFDS is imported on first use: it takes half a second, and files need none of
it.
"""

import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpo_jax.errors import DataError

# Columns of this suffix hold JSON text; readers see the value without it.
JSON_SUFFIX = "__json"

# name, name/config, name:1.0.0 or huggingface:owner/name
_NAME = re.compile(r"(huggingface:[\w./-]+|[a-z]\w*(/[\w.+-]+)?)(:[\d.]+)?")


def scan(source: str, split: str) -> Iterator[tuple[str, dict | DataError]]:
  """Yields (`source[row]`, row or error) of a directory or a TFDS name."""
  builder = _builder(source)
  known = sorted(builder.info.splits)
  if re.split(r"[\[+]", split)[0] not in known:
    raise DataError(
      f"{source}: unknown split {split!r}; known are {', '.join(known)}"
    )
  try:
    rows = builder.as_data_source(split=split)
    count = len(rows)
  except Exception as error:
    raise _refusal(source, error) from None
  # Rows of a slice are numbered within it, and say so.
  name = source if split in known else f"{source}:{split}"
  for number in range(count):
    where = f"{name}[{number}]"
    try:
      row = rows[number]
    except Exception as error:
      raise _refusal(where, error) from None
    yield where, _plain_row(where, row)


def digest(source: str) -> str:
  """SHA-256 of the names, sizes and modification times of the files."""
  result = hashlib.sha256()
  folder = pathlib.Path(_builder(source).data_path)
  for path in sorted(folder.iterdir()):
    stat = path.stat()
    entry = f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
    result.update(entry.encode())
  return result.hexdigest()


def _builder(source: str) -> Any:
  path = pathlib.Path(source)
  if path.is_dir():
    if not (path / "dataset_info.json").is_file():
      raise DataError(
        f"{source}: a directory without dataset_info.json; expected one "
        "prepared by TFDS (scripts/prepare_data.py writes them)"
      )
  elif not _NAME.fullmatch(source):
    raise DataError(f"{source}: no such file, directory or TFDS dataset")
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    raise DataError(
      f"{source}: reading TFDS data needs tensorflow-datasets; "
      "pip install 'dpo-jax[train]'"
    ) from None
  logging.getLogger("absl").setLevel(logging.WARNING)
  try:
    if path.is_dir():
      return tfds.builder_from_directory(path)
    builder = tfds.builder(source, file_format="array_record")
    if not builder.is_prepared():
      builder.download_and_prepare()
    return builder
  except tfds.core.DatasetNotFoundError:
    raise DataError(
      f"{source}: no such file, directory or TFDS dataset"
    ) from None
  except Exception as error:
    raise _refusal(source, error) from None


def _refusal(where: str, error: Exception) -> DataError:
  lines = str(error).strip().splitlines()
  reason = lines[0] if lines else type(error).__name__
  return DataError(f"{where}: TFDS cannot read it ({reason[:300]})")


def _plain_row(where: str, row: dict) -> dict | DataError:
  try:
    result = {}
    for key, value in row.items():
      value = _plain(value)
      if key.endswith(JSON_SUFFIX):
        key, value = key.removesuffix(JSON_SUFFIX), json.loads(value)
      result[key] = _list_of_objects(value)
    return result
  except UnicodeDecodeError:
    return DataError(f"{where}: column {key!r} is not UTF-8")
  except (TypeError, ValueError) as error:
    return DataError(f"{where}: column {key!r} holds no JSON ({error})")


def _plain(value: Any) -> Any:
  match value:
    case bytes():
      return value.decode("utf-8")
    case np.ndarray() | np.generic():
      return _plain(value.tolist())
    case dict():
      return {key: _plain(inner) for key, inner in value.items()}
    case list() | tuple():
      return [_plain(inner) for inner in value]
    case _:
      return value


def _list_of_objects(value: Any) -> Any:
  """Undoes how TFDS stores a sequence of objects: as an object of lists."""
  if not isinstance(value, dict) or not value:
    return value
  columns = list(value.values())
  if not all(isinstance(column, list) for column in columns):
    return value
  if len({len(column) for column in columns}) != 1:
    return value
  return [dict(zip(value, row)) for row in zip(*columns)]
