"""Writes preference data as a TFDS dataset in array_record, no TensorFlow.

Strings become text columns. Messages become JSON text in a column whose name
ends in `__json`, which `tfds_rows` reads back as messages.
"""

import collections
import contextlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpo_jax.data import formats, sources
from dpo_jax.data.tfds_rows import JSON_SUFFIX
from dpo_jax.data.tokenizer import check_text
from dpo_jax.errors import DataError

_NUMBERS = {"label": np.bool_, "margin": np.float32}


class Preferences(tfds.core.GeneratorBasedBuilder):
  """Normalised rows of any format in `formats`, in the order of the source."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self, inputs: Mapping[str, str], on_bad_row: str = "error", **kwargs: Any
  ):
    """`inputs` maps the name of a split to its source."""
    self._inputs = dict(inputs)
    self._drop = on_bad_row == "drop"
    self.dropped: collections.Counter[str] = collections.Counter()
    self._columns = self._first_row_columns()
    super().__init__(file_format="array_record", **kwargs)

  def _first_row_columns(self) -> list[str]:
    for source in self._inputs.values():
      for _, row in self._rows(source):
        return list(row)
    raise DataError(f"{', '.join(self._inputs.values())}: no usable row")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      name: _NUMBERS.get(name) or tfds.features.Text() for name in self._columns
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="Preference data: prompts with their responses.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, _: Any) -> dict[str, Iterator]:
    self.dropped.clear()
    return {
      split: self._generate_examples(source)
      for split, source in self._inputs.items()
    }

  def _generate_examples(self, source: str) -> Iterator[tuple[int, dict]]:
    number = 0
    for where, row in self._rows(source):
      if list(row) != self._columns:
        row = self._bad(
          where, f"columns {list(row)} after rows of {self._columns}"
        )
      if row:
        yield number, row
        number += 1

  def _rows(self, source: str) -> Iterator[tuple[str, dict]]:
    fmt = ""
    for where, row in sources.scan_rows(source):
      try:
        if isinstance(row, DataError):
          raise DataError(str(row).removeprefix(f"{where}: "))
        found = formats.detect_format(row)
        fmt = fmt or found
        if found != fmt:
          raise DataError(f"a row of shape {found!r} in a source of {fmt!r}")
        yield where, normalise(row, fmt)
      except DataError as error:
        self._bad(where, str(error))

  def _bad(self, where: str, sentence: str) -> None:
    if not self._drop:
      raise DataError(f"{where}: {sentence}")
    self.dropped[where] += 1


def normalise(row: dict, fmt: str) -> dict:
  """The columns stored for a row: prompt, its responses, their scores, label,
  margin, subset.

  Raises:
    DataError: a value has the wrong type, or text cannot be UTF-8.
  """
  example = formats.to_example(row, fmt)
  values = {"prompt": example.prompt}
  if fmt == "ranked":
    values["responses"] = example.responses
    if example.scores:
      values["scores"] = example.scores
  else:
    pair = ("chosen", "rejected")
    names = pair if fmt in formats.PAIRED else ("completion",)
    values |= zip(names, example.responses)
  columns = {}
  for name, value in values.items():
    if not isinstance(value, str):
      value = json.dumps(value, ensure_ascii=False)
      name += JSON_SUFFIX
    check_text(value, repr(name))
    columns[name] = value
  if example.desirable is not None:
    columns["label"] = example.desirable
  if fmt in formats.PAIRED and "margin" in row:
    columns["margin"] = example.margin
  if "subset" in row:
    check_text(example.subset, "'subset'")
    columns["subset"] = example.subset
  return columns


def prepare(
  inputs: Mapping[str, str], output: str, on_bad_row: str = "error"
) -> dict[str, Any]:
  """Writes `output`, a directory that `read_rows` and TFDS can read.

  Args:
    inputs: name of a split to its source; all of one format.
    output: must not exist. It appears complete or not at all.
    on_bad_row: `error` stops at a row that fits no shape, `drop` counts it.

  Returns:
    `rows`: rows written, by split; `dropped`: how many rows were not.

  Raises:
    DataError: a source cannot be read, or `output` exists.
  """
  final = pathlib.Path(output)
  if final.exists():
    raise DataError(f"{output}: exists already; expected a new directory")
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix=f"{final.name}.", dir=final.parent)
  except OSError as error:
    reason = error.strerror
    raise DataError(f"{output}: cannot be written ({reason})") from None
  logging.getLogger("absl").setLevel(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    builder = Preferences(inputs, on_bad_row, data_dir=work)
    # TFDS reports its progress on stdout whatever it is told.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
    os.rename(builder.data_path, final)
    rows = {name: s.num_examples for name, s in builder.info.splits.items()}
    return {"rows": rows, "dropped": builder.dropped.total()}
  except OSError as error:
    raise DataError(f"{output}: cannot be written ({error})") from None
  finally:
    shutil.rmtree(work, ignore_errors=True)
