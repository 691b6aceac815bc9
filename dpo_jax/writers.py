"""Where metrics go: always a JSON-lines file, TensorBoard and W&B on request.

`metrics.jsonl` is the record; the report and the tests read it. TensorBoard
and W&B are views of it that may be missing or fail without harm.
"""

import contextlib
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import DataError
from dpo_jax.files import cannot_write, write_whole

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
SPLITS = ("train", "eval")
_TENSORBOARD, _WANDB_ID = "tensorboard", "wandb_id.txt"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_Log = Callable[[int, str, dict[str, float]], None]
_Close = Callable[[], None]


def encode_float(value: float) -> float | str:
  """Non-finite floats as strings: JSON has no number for them."""
  value = float(value)
  return value if math.isfinite(value) else str(value)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a metrics file, "nan" and "inf" back as floats.

  A last line that was cut by a kill is left out; damage anywhere else raises
  `DataError` with the line number.
  """
  rows = []
  lines = _lines(Path(path))
  for number, line in enumerate(lines, 1):
    row = _parse(line)
    if row is not None:
      rows.append(row)
    elif number < len(lines):
      raise DataError(
        f"{path}, line {number}: not a metrics row; expected a JSON object"
        ' with an integer "step"'
      )
  return rows


class MetricsWriter:
  """Appends one row per call to `directory/metrics.jsonl`.

  With `resume_step`, rows of later steps are removed first, since training
  is about to write them again. Only one process of a run should own a writer.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    tensorboard: bool = False,
    wandb: bool = False,
    run_name: str = "",
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
  ):
    """Raises DataError where the file cannot be read or written."""
    self.directory = Path(directory)
    self.path = self.directory / FILE_NAME
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      _repair(self.path, resume_step)
      self._file = self.path.open("a", encoding="utf-8")
    except OSError as error:
      raise cannot_write(self.path, error) from error
    self._backends: dict[str, tuple[_Log, _Close]] = {}
    if tensorboard:
      self._start(
        "tensorboard",
        "tensorboardX",
        lambda: _tensorboard(self.directory, resume_step),
      )
    if wandb:
      self._start(
        "wandb", "wandb", lambda: _wandb(self.directory, run_name, config)
      )

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Appends one row; `values` are anything that `float` accepts.

    Raises:
      DataError: the file cannot be written, as on a disk that is full.
    """
    if split not in SPLITS:
      raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if taken := {"step", "split"} & values.keys():
      raise ValueError(f"reserved metric names: {sorted(taken)}")
    step = int(step)
    numbers = {key: float(value) for key, value in values.items()}
    row = {"step": step, "split": split}
    row |= {key: encode_float(value) for key, value in numbers.items()}
    try:
      self._file.write(json.dumps(row, allow_nan=False) + "\n")
      self._file.flush()
    except OSError as error:
      raise cannot_write(self.path, error) from error
    for name in list(self._backends):
      self._guard(name, self._backends[name][0], step, split, numbers)

  def close(self) -> None:
    """Closes the file and the backends; safe to call twice."""
    with contextlib.suppress(OSError):  # of a row that `write` spoke of
      self._file.close()
    for name in list(self._backends):
      self._guard(name, self._backends[name][1])
      self._backends.pop(name, None)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def _start(
    self, name: str, package: str, make: Callable[[], tuple[_Log, _Close]]
  ) -> None:
    try:
      self._backends[name] = make()
    except ImportError as error:
      logger.warning(
        '%s is off: cannot import %s (%s); pip install "dpo-jax[%s]".'
        " Metrics go to %s.",
        *(name, package, error, name, self.path),
      )
    except Exception as error:
      self._give_up(name, error)

  def _guard(self, name: str, call: Callable[..., None], *args: Any) -> None:
    try:
      call(*args)
    except Exception as error:
      self._backends.pop(name, None)
      self._give_up(name, error)

  def _give_up(self, name: str, error: Exception) -> None:
    logger.warning(
      "%s is off for the rest of this run: %s: %s. Metrics go to %s.",
      *(name, type(error).__name__, error, self.path),
    )


def views(directory: str | os.PathLike) -> list[Path]:
  """What the views of a run keep in its directory."""
  return [Path(directory) / name for name in (_TENSORBOARD, _WANDB_ID)]


class NoWriter:
  """For the processes of a run that do not write."""

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes nothing."""

  def __enter__(self) -> "NoWriter":
    return self

  def __exit__(self, *exc_info: object) -> None:
    pass


def _lines(path: Path) -> list[bytes]:
  try:
    return [line for line in path.read_bytes().split(b"\n") if line.strip()]
  except FileNotFoundError:
    raise DataError(f"{path}: no such metrics file") from None
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  return {
    key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
    for key, value in row.items()
  }


def _repair(path: Path, resume_step: int | None) -> None:
  """Drops unreadable lines and rows after `resume_step`, atomically."""
  if not path.exists():
    return
  kept, damaged = [], 0
  lines = _lines(path)
  for number, line in enumerate(lines, 1):
    row = _parse(line)
    if row is None:
      damaged += number < len(lines)
    elif resume_step is None or row["step"] <= resume_step:
      kept.append(line + b"\n")
  if damaged:
    logger.warning("%s: dropped %d unreadable lines", path, damaged)
  content = b"".join(kept)
  if content == path.read_bytes():
    return
  write_whole(path, content)


def _tensorboard(
  directory: Path, resume_step: int | None
) -> tuple[_Log, _Close]:
  from tensorboardX import SummaryWriter

  purge = None if resume_step is None else resume_step + 1
  writer = SummaryWriter(str(directory / _TENSORBOARD), purge_step=purge)

  def log(step: int, split: str, values: dict[str, float]) -> None:
    for key, value in values.items():
      writer.add_scalar(f"{split}/{key}", value, step)

  return log, writer.close


def _wandb(
  directory: Path, run_name: str, config: Mapping[str, Any] | None
) -> tuple[_Log, _Close]:
  import wandb

  # A resumed run continues its curves under the id it started with.
  id_file = directory / _WANDB_ID
  if not id_file.exists():
    id_file.write_text(uuid.uuid4().hex[:12] + "\n")
  run = wandb.init(
    project=os.environ.get("WANDB_PROJECT", "dpo_jax"),
    name=run_name or None,
    id=id_file.read_text().strip(),
    resume="allow",
    dir=str(directory),
    config=dict(config or {}),
  )
  # W&B ignores rows whose own step goes back; after a resume ours does.
  run.define_metric("step")
  run.define_metric("*", step_metric="step")

  def log(step: int, split: str, values: dict[str, float]) -> None:
    run.log({"step": step, **{f"{split}/{k}": v for k, v in values.items()}})

  return log, run.finish
