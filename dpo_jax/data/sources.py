"""Rows from files and from TFDS, each with the place it came from.

Everything is read as plain Python values (str, int, float, bool, None, list,
dict), one row at a time where the container allows it. No row is judged here
beyond being an object; `formats` says which shapes mean what.
"""

import gzip
import hashlib
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from dpo_jax.data import tfds_rows
from dpo_jax.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

_SLICE = re.compile(
  r"(?P<name>\w+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?"
)

# A few bytes of a compressed file can stand for as many as one likes. Of a row
# Python makes some twenty times its size.
MAX_LINE = 16 << 20
MAX_SKIPPED = 1 << 30  # of one line that is too long
MAX_WHOLE = 512 << 20  # of a .json, which is read in one piece

Item = tuple[str, dict | DataError]


def read_rows(source: str, split: str = "train") -> Iterator[tuple[str, dict]]:
  """Yields (place, row) for each row of `source`.

  Args:
    source: a file (`.jsonl`, `.jsonl.gz`, `.json`, `.json.gz`, `.parquet`), a
      directory prepared by TFDS, or the name of a TFDS dataset.
    split: a TFDS split with optional slice, as `train[:90%]`. A plain file has
      the one split `train`, which can be sliced in the same way.

  Raises:
    DataError: the source is missing, unreadable, empty or of an unknown kind,
      the split is unknown, or a row is not a JSON object; the message begins
      with `path:line` or `path[row]`.
  """
  for where, row in scan_rows(source, split):
    if isinstance(row, DataError):
      raise row
    yield where, row


def scan_rows(source: str, split: str = "train") -> Iterator[Item]:
  """`read_rows` that yields the error in place of a row it cannot read.

  For callers that count damaged rows and go on. Damage that hides the rest of
  the source (a cut gzip stream, a broken `.json`) is still raised.
  """
  path = pathlib.Path(source)
  if is_file_name(source):
    items = _slice_file(_file_items(path), split, source)
  elif path.is_dir() or not path.exists():
    items = tfds_rows.scan(source, split)
  else:
    raise DataError(
      f"{source}: unknown kind of file; expected {', '.join(SUFFIXES)}"
    )
  empty = True
  for item in items:
    empty = False
    yield item
  if empty:
    raise DataError(f"{source}: no rows in split {split!r}")


def source_digest(source: str) -> str:
  """SHA-256 that changes when the rows of `source` may have changed.

  A file is hashed by its bytes, a TFDS directory by the names, sizes and
  modification times of its files.
  """
  if not is_file_name(source):
    return tfds_rows.digest(source)
  digest = hashlib.sha256()
  try:
    with open(source, "rb") as file:
      while block := file.read(1 << 20):
        digest.update(block)
  except OSError as error:
    raise _unreadable(source, error) from None
  return digest.hexdigest()


def is_file_name(source: str) -> bool:
  """Whether the name ends like a file that can be read here."""
  return source.lower().endswith(SUFFIXES) and not pathlib.Path(source).is_dir()


def parse_json(text: str) -> Any:
  """Strict JSON: NaN and infinities are refused. Raises ValueError."""
  try:
    return json.loads(text, parse_constant=_refuse_constant)
  except RecursionError:
    raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not JSON")


def _unreadable(path: Any, error: Exception) -> DataError:
  if isinstance(error, FileNotFoundError):
    return DataError(f"{path}: no such file")
  reason = getattr(error, "strerror", None) or error
  return DataError(f"{path}: cannot be read ({reason})")


def _file_items(path: pathlib.Path) -> Iterator[Item]:
  name = path.name.lower()
  if name.endswith(".parquet"):
    return _parquet_items(path)
  reader = _line_items if ".jsonl" in name[-9:] else _list_items
  return reader(path, gzip.open if name.endswith(".gz") else open)


def _line_items(path: pathlib.Path, opener: Any) -> Iterator[Item]:
  try:
    # Bytes, because a text file would also end lines at a lone "\r".
    with opener(path, "rb") as file:
      for number, line in enumerate(_lines(file), start=1):
        where = f"{path}:{number}"
        if line is None:
          yield where, DataError(f"{where}: longer than {_mib(MAX_LINE)}")
        elif line.strip():
          yield where, _parse_line(where, line, number == 1)
  except (OSError, EOFError, zlib.error) as error:
    raise _unreadable(path, error) from None


def _lines(file: Any) -> Iterator[bytes | None]:
  """The lines of a file; None for one that is too long."""
  while line := file.readline(MAX_LINE):
    if len(line) < MAX_LINE or line.endswith(b"\n"):
      yield line
      continue
    skipped = 0
    while line and not line.endswith(b"\n"):
      skipped += len(line)
      if skipped > MAX_SKIPPED:
        raise OSError(f"a line of more than {_mib(MAX_SKIPPED)}")
      line = file.readline(MAX_LINE)
    yield None


def _mib(size: int) -> str:
  return f"{size >> 20} MiB"


def _parse_line(where: str, line: bytes, first: bool) -> dict | DataError:
  try:
    row = parse_json(line.decode("utf-8-sig" if first else "utf-8"))
  except UnicodeDecodeError as error:
    return DataError(f"{where}: not UTF-8 at byte {error.start} of the line")
  except ValueError as error:
    return DataError(f"{where}: not a JSON object ({error})")
  if not isinstance(row, dict):
    return DataError(f"{where}: expected a JSON object, found {kind_of(row)}")
  return row


def _list_items(path: pathlib.Path, opener: Any) -> Iterator[Item]:
  try:
    with opener(path, "rb") as file:
      data = file.read(MAX_WHOLE + 1)
    if len(data) > MAX_WHOLE:
      raise OSError(
        f"more than {_mib(MAX_WHOLE)}; rows one to a line, in a .jsonl file,"
        " may be as many as one likes"
      )
    rows = parse_json(data.decode("utf-8-sig"))
  except (OSError, EOFError, zlib.error) as error:
    raise _unreadable(path, error) from None
  except UnicodeDecodeError as error:
    raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
  except json.JSONDecodeError as error:
    raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
  except ValueError as error:
    raise DataError(f"{path}: not JSON ({error})") from None
  if not isinstance(rows, list):
    raise DataError(
      f"{path}: expected a list of objects, found {kind_of(rows)}; rows one to "
      "a line belong in a .jsonl file"
    )
  for number, row in enumerate(rows):
    where = f"{path}[{number}]"
    if not isinstance(row, dict):
      row = DataError(f"{where}: expected an object, found {kind_of(row)}")
    yield where, row


def _parquet_items(path: pathlib.Path) -> Iterator[Item]:
  try:
    import pyarrow  # 176 MB, an extra
    from pyarrow import parquet
  except ImportError:
    raise DataError(
      f"{path}: reading .parquet needs pyarrow; pip install 'dpo-jax[parquet]'"
    ) from None
  try:
    number = 0
    with parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
          yield f"{path}[{number}]", row
          number += 1
  except (OSError, pyarrow.ArrowException, ValueError) as error:
    if isinstance(error, FileNotFoundError):
      raise _unreadable(path, error) from None
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise DataError(f"{path}: not a readable .parquet ({reason})") from None


def kind_of(value: Any) -> str:
  """The JSON name of a value's type, for messages."""
  names = {
    type(None): "null",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
  }
  return names.get(type(value), type(value).__name__)


def _slice_file(
  items: Iterator[Item], split: str, source: str
) -> Iterator[Item]:
  match = _SLICE.fullmatch(split)
  if not match or match["name"] != "train":
    raise DataError(
      f"{source}: unknown split {split!r}; a plain file has one split, 'train' "
      "(or a slice of it, as 'train[:90%]')"
    )
  bounds = [match["start"], match["stop"]]
  # A percentage or a place counted from the end needs the number of rows.
  if not any(bound and not bound.isdigit() for bound in bounds):
    return itertools.islice(items, *(int(b) if b else None for b in bounds))
  held = list(items)

  def place(bound: str | None) -> int | None:
    if not bound or bound[-1] != "%":
      return int(bound) if bound else None
    # To the nearest row, as TFDS rounds.
    return round(int(bound[:-1]) * len(held) / 100)

  return iter(held[place(bounds[0]) : place(bounds[1])])
