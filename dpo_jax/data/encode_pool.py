"""Encoding on many cores: the same result as on one, in the same order."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool

from dpo_jax.data.encode import CHUNK, Encoded, Encoder
from dpo_jax.data.encode_settings import EncodeSettings
from dpo_jax.data.sources import Item
from dpo_jax.data.tokenizer import HFTokenizer
from dpo_jax.errors import DataError

_ALONE = 8  # chunks before others are started: what is small needs none


def encode_rows(
  items: Iterable[Item],
  tokenizer: HFTokenizer,
  settings: EncodeSettings,
  progress: Callable[[int], None] | None = None,
  *,
  workers: int = 1,
) -> Encoded:
  """Encodes (place, row) items as `encode.Encoder` does, `workers` at a time.

  Rows are read here and encoded by processes of their own, which know nothing
  of jax or of the program that runs; what these make is put together in order,
  so that the result is equal bit for bit, and so is the first error.

  Args:
    items: see `sources.scan_rows`; an error in place of a row is a bad row.
    tokenizer: of all texts.
    settings: how rows become examples.
    progress: called with the number of rows done, now and then.
    workers: processes; 0 is one a core that this process may use, 1 is this
      process alone, and so are a few thousand rows.

  Raises:
    DataError: the rows' shape does not suit the kind, a row cannot be used and
      the settings say so, the template or tokenizer cannot be used at all, or
      a worker was ended from outside.
  """
  encoder, chunks = Encoder(tokenizer, settings), _chunks(iter(items))
  result, told = encoder.result, progress or (lambda rows: None)
  workers = workers or _cores()
  for number in itertools.count(1):
    chunk = next(chunks, None)
    if chunk is None:
      return result
    encoder.encode(chunk)
    told(result.rows)
    # The first usable row decides what the others must look like.
    if workers > 1 and number >= _ALONE and result.format:
      break
  first = next(chunks, None)
  if first is not None:
    chunks = itertools.chain([first], chunks)
    for part in _encoded(chunks, tokenizer, settings, result, workers):
      result.extend(part)
      told(result.rows)
  return result


def _encoded(
  chunks: Iterator[list[Item]],
  tokenizer: HFTokenizer,
  settings: EncodeSettings,
  before: Encoded,
  workers: int,
) -> Iterator[Encoded]:
  """Encodes chunks by processes; yields their results in order."""
  pool = futures.ProcessPoolExecutor(
    workers,
    multiprocessing.get_context("spawn"),
    initializer=_begin,
    initargs=(tokenizer, settings),
  )
  rows, waiting, problem = before.rows, collections.deque(), None
  try:
    while True:
      while problem is None and len(waiting) < 2 * workers:
        try:
          chunk = next(chunks)
        except Exception as error:  # the end, or what is read is damaged:
          problem = error  # after what was read before
          break
        with _unknown_main():
          future = pool.submit(_encode, chunk, before.format, rows)
        waiting.append((chunk[0][0], future))
        rows += len(chunk)
      if not waiting:
        break
      where, future = waiting.popleft()
      try:
        yield future.result()
      except BrokenProcessPool:
        raise DataError(
          f"{where}: a process that encodes rows from here on was ended from"
          " outside, for want of memory perhaps; fewer (data.workers) need less"
        ) from None
    if not isinstance(problem, StopIteration):
      raise problem
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
  while chunk := list(itertools.islice(items, CHUNK)):
    yield chunk


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@contextlib.contextmanager
def _unknown_main() -> Iterator[None]:
  """Starts processes that do not import the program: it may not be made for
  that, and what is needed here is in this package."""
  main = sys.modules["__main__"]
  sys.modules["__main__"] = types.ModuleType("__main__")
  try:
    yield
  finally:
    sys.modules["__main__"] = main


# In a worker.

_GIVEN: list = []


def _begin(tokenizer: HFTokenizer, settings: EncodeSettings) -> None:
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is for who started this
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _GIVEN[:] = tokenizer, settings


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def _encode(chunk: list[Item], fmt: str, rows: int) -> Encoded:
  encoder = Encoder(*_GIVEN, fmt=fmt, rows=rows)
  try:
    encoder.encode(chunk)
  except DataError:
    raise
  except Exception as error:
    error.add_note(f"while encoding {chunk[0][0]} to {chunk[-1][0]}")
    raise
  return encoder.result
