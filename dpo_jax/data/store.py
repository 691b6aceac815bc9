"""Encoded examples as flat arrays, and the cache that keeps them on disk."""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from dpo_jax.data import cache, sources
from dpo_jax.data.encode import Encoded, EncodeSettings
from dpo_jax.data.encode_pool import encode_rows
from dpo_jax.data.tokenizer import HFTokenizer
from dpo_jax.errors import DataError

# Counts up when the same rows and settings would give other arrays.
VERSION = 3

_log = logging.getLogger("dpo_jax")


@dataclass(frozen=True, eq=False)
class Examples:
  """N examples, their tokens end to end.

  Attributes:
    tokens: i32[total]; of each example the prompt, then its responses, best
      first.
    offsets: i64[N + 1], where each example begins in `tokens`.
    prompt_lengths: i32[N].
    lengths: i32[N K], of the responses, 0 behind the last; K is the most that
      an example has, and at least 2.
    desirable: bool[N], True unless labelled otherwise.
    margins: f32[N], by how much the first response of a pair is better; 0
      unless the data says it.
    rows: i64[N], the row of the source (of the slice of it), from 0.
    subsets: i32[N], index into `subset_names`.
    report: what was read, dropped and changed; JSON values only.
    fingerprint: SHA-256 (hex) of the arrays and the settings.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  prompt_lengths: np.ndarray
  lengths: np.ndarray
  desirable: np.ndarray
  margins: np.ndarray
  rows: np.ndarray
  subsets: np.ndarray
  subset_names: tuple[str, ...]
  kind: str
  format: str
  report: dict
  fingerprint: str

  def __len__(self) -> int:
    return len(self.prompt_lengths)

  @property
  def chosen_lengths(self) -> np.ndarray:
    """i32[N], of the first (or only) response."""
    return self.lengths[:, 0]

  @property
  def rejected_lengths(self) -> np.ndarray:
    """i32[N], of the second response; 0 where there is none."""
    return self.lengths[:, 1]

  def prompt(self, i: int) -> np.ndarray:
    """i32[prompt_lengths[i]], a view."""
    start = self.offsets[i]
    return self.tokens[start : start + self.prompt_lengths[i]]

  def response(self, i: int, k: int) -> np.ndarray:
    """i32[lengths[i, k]], a view."""
    before = self.lengths[i, :k].sum()
    start = self.offsets[i] + self.prompt_lengths[i] + before
    return self.tokens[start : start + self.lengths[i, k]]

  def chosen(self, i: int) -> np.ndarray:
    """i32[lengths[i, 0]], a view."""
    return self.response(i, 0)

  def rejected(self, i: int) -> np.ndarray:
    """i32[lengths[i, 1]], a view."""
    return self.response(i, 1)

  def slice(self, start: int | None, stop: int | None) -> "Examples":
    """The examples of `[start:stop]`, as views."""
    start, stop, _ = slice(start, stop).indices(len(self))
    stop = max(start, stop)
    first, last = self.offsets[start], self.offsets[stop]
    return self._part(
      f"slice {start} {stop}".encode(),
      np.arange(start, stop),
      self.tokens[first:last],
    )

  def select(self, indices: Sequence[int] | np.ndarray) -> "Examples":
    """The examples at `indices`, in that order; copies the tokens."""
    indices = np.arange(len(self))[np.asarray(indices, dtype=np.int64)]
    pieces = [
      self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices
    ]
    tokens = np.concatenate([self.tokens[:0], *pieces])
    return self._part(indices.tobytes(), indices, tokens)

  def _part(
    self, what: bytes, indices: np.ndarray, tokens: np.ndarray
  ) -> "Examples":
    lengths = np.diff(self.offsets)[indices]
    per_example = {name: getattr(self, name)[indices] for name in _PER_EXAMPLE}
    digest = hashlib.sha256(self.fingerprint.encode() + what)
    return replace(
      self,
      tokens=tokens,
      offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      **per_example,
      report=self.report | {"examples": len(indices)},
      fingerprint=digest.hexdigest(),
    )


_ARRAYS = tuple(f.name for f in fields(Examples) if f.type is np.ndarray)
_PER_EXAMPLE = tuple(n for n in _ARRAYS if n not in ("tokens", "offsets"))


def load_examples(
  source: str,
  split: str,
  tokenizer: HFTokenizer,
  settings: EncodeSettings,
  cache_dir: str = "",
  progress: Callable[[int], None] | None = None,
  workers: int = 1,
) -> Examples:
  """Reads, encodes and caches the examples of a source.

  Args:
    source, split: see `sources.read_rows`.
    tokenizer: see `tokenizer.load_tokenizer`.
    settings: how rows become examples.
    cache_dir: where encoded data is kept, under a name made of everything that
      determines it; "" keeps none. Arrays read from it are memory-mapped.
    progress: called with the number of rows done.
    workers: processes that encode, see `encode_pool.encode_rows`.

  Raises:
    DataError: the source cannot be read, its shape does not suit, or no
      example is left.
  """
  encode = functools.partial(
    _encode, source, split, tokenizer, settings, progress, workers
  )
  if not cache_dir:
    return encode()
  key = _digest(
    VERSION,
    sources.source_digest(source),
    source,
    split,
    tokenizer.fingerprint,
    asdict(settings),
  )
  with cache.locked(cache_dir, key):
    found = cache.read(cache_dir, key, _ARRAYS)
    if found:
      arrays, meta = found
      meta["subset_names"] = tuple(meta["subset_names"])
      examples = Examples(**arrays, **meta)
      _log.info("%s, from cache %s", _summary(examples.report), key[:12])
      return examples
    examples = encode()
    arrays = {name: getattr(examples, name) for name in _ARRAYS}
    meta = {
      f.name: getattr(examples, f.name)
      for f in fields(Examples)
      if f.name not in _ARRAYS
    }
    cache.write(cache_dir, key, arrays, meta)
  return examples


def _encode(source, split, tokenizer, settings, progress, workers) -> Examples:
  begun = time.monotonic()
  items = sources.scan_rows(source, split)
  encoded = encode_rows(items, tokenizer, settings, progress, workers=workers)
  examples = _assemble(encoded, source, tokenizer, settings)
  seconds = time.monotonic() - begun
  _log.info("%s, in %.1f s", _summary(examples.report), seconds)
  return examples


def check_vocabulary(examples: Examples, vocab_size: int) -> None:
  """Raises DataError if a token id is not below the model's `vocab_size`."""
  largest = int(examples.tokens.max(initial=-1))
  if largest >= vocab_size:
    at = int(np.argmax(examples.tokens))
    i = int(np.searchsorted(examples.offsets, at, side="right")) - 1
    raise DataError(
      f"{examples.report['source']}: row {examples.rows[i]} has token id "
      f"{largest}, and the model's vocabulary ends at {vocab_size - 1}; the "
      "tokenizer is not the model's"
    )


def check_rankings(examples: Examples, least: int) -> None:
  """Raises DataError if an example has fewer than `least` responses."""
  counts = (examples.lengths > 0).sum(axis=1)
  short = np.flatnonzero(counts < least)
  if len(short):
    i = int(short[0])
    raise DataError(
      f"{examples.report['source']}: row {examples.rows[i]} has {counts[i]} "
      f"responses to rank, {len(short)} rows of {len(examples)} have too few; "
      f"the loss needs {least} in every row"
    )


def _assemble(
  encoded: Encoded,
  source: str,
  tokenizer: HFTokenizer,
  settings: EncodeSettings,
) -> Examples:
  report = {
    "source": source,
    "format": encoded.format,
    "rows": encoded.rows,
    "examples": len(encoded),
    "dropped": {k: n for k, n in sorted(encoded.dropped.items()) if n},
    "changed": {k: n for k, n in sorted(encoded.changed.items()) if n},
    "first_dropped": encoded.first_dropped,
  }
  if not len(encoded):
    raise DataError(
      f"{source}: no example left of {encoded.rows} rows "
      f"({_counts(report['dropped'])}); first: "
      f"{encoded.first_error or 'nothing wrong'}"
    )
  prompt_lengths = np.array(encoded.prompt_lengths, dtype=np.int32)
  counts = np.array(encoded.counts)
  k = max(2, counts.max())
  lengths = np.zeros((len(encoded), k), np.int32)
  lengths[np.arange(k) < counts[:, None]] = encoded.lengths
  totals = np.cumsum(prompt_lengths + lengths.sum(axis=1), dtype=np.int64)
  arrays = {
    "tokens": np.frombuffer(encoded.tokens, dtype=np.int32),
    "offsets": np.concatenate([np.zeros(1, np.int64), totals]),
    "prompt_lengths": prompt_lengths,
    "lengths": lengths,
    "desirable": np.array(encoded.desirable, dtype=bool),
    "margins": np.array(encoded.margins, dtype=np.float32),
    "rows": np.array(encoded.row_numbers, dtype=np.int64),
    "subsets": np.array(encoded.subsets, dtype=np.int32),
  }
  names = tuple(encoded.subset_names)
  content = [hashlib.sha256(array).hexdigest() for array in arrays.values()]
  return Examples(
    **arrays,
    subset_names=names,
    kind=settings.kind,
    format=encoded.format,
    report=report,
    fingerprint=_digest(
      content, names, tokenizer.fingerprint, asdict(settings)
    ),
  )


def _digest(*parts: object) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _counts(counts: dict[str, int]) -> str:
  return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"


def _summary(report: dict) -> str:
  return (
    f"{report['source']}: format {report['format']}, {report['rows']} rows, "
    f"{report['examples']} examples, dropped: {_counts(report['dropped'])}, "
    f"changed: {_counts(report['changed'])}"
  )
