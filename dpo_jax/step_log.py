"""What a run says of its training steps: the train rows of metrics.jsonl."""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import flops, losses, metrics
from dpo_jax.errors import UserError
from dpo_jax.files import cannot_write
from dpo_jax.progress import Progress
from dpo_jax.run import Run
from dpo_jax.writers import MetricsWriter

_LOG = logging.getLogger("dpo_jax")
T = TypeVar("T")


class StepLog:
  """Means over the steps between two rows of metrics.jsonl, with the columns
  of `metrics.CLOCKED`.

  `goodput` counts from the first start of the run, so what stops, restarts,
  lost steps, compiling, evaluation and saving take lowers it. The first step
  of each shape compiles: neither it nor the one before, while which it
  is launched, is timed.
  """

  def __init__(
    self,
    run: Run,
    started: float | None = None,
    skipped: pathlib.Path | None = None,
    saved: Callable[[], str] = lambda: "nothing was saved",
  ):
    """Args:
    run: what is trained.
    started: when, as `time.time()`; None: now.
    skipped: file for the steps whose update was not finite, a JSON object
      with their rows of the data a line; None: none.
    saved: says what there is to continue from.
    """
    self._run = run
    self._skipped = skipped
    self._saved = saved
    # All at once, for a device would do one only after the steps before it.
    steps = jnp.arange(run.steps)
    self._rates = np.asarray(jax.jit(jax.vmap(run.schedule))(steps))
    self._started = time.time() if started is None else started
    self._peak = flops.peak(
      jax.devices()[0].device_kind,
      run.config.model.dtype,
      run.config.log.peak_tflops,
    )
    self._useful = 0.0  # seconds of applied steps since `started`
    self._mark: float | None = None  # when the step before was done
    self._first: dict[Any, int] = {}  # step of each shape, in here
    self._sums: dict[str, losses.Sums] = {}
    self._timed = _Timed()
    self._waited = 0.0  # for data, since the step before was done
    self._skipped_in_a_row = 0
    self.writer: MetricsWriter | None = None

  def add(self, progress: Progress, step: int, sums: Any) -> None:
    """Adds one step; writes a row where one is due.

    Raises:
      UserError: too many steps in a row were not finite.
    """
    t = self._run.config.train
    sums = jax.device_get(sums)
    skipped = float(sums["skipped"].total)
    self._check_finite(step, skipped)
    self._sums = metrics.add([self._sums, sums])
    now = time.perf_counter()
    seconds = self._run.seconds(step)
    if seconds is None and self._mark is not None:
      seconds = now - self._mark
    if not self._compiled(step) and seconds is not None:
      self._timed.add(self._run, step, seconds, self._waited)
      self._useful += 0 if skipped else seconds
    self._mark, self._waited = now, 0.0
    progress.update(step, metrics.means(sums))
    every = t.log_every
    if not ((every and step % every == 0) or step == self._run.steps):
      return
    row = metrics.means(self._sums)
    row["learning_rate"] = float(self._rates[step - 1])
    self.writer.write(step, "train", row | self._clocked())
    self._sums, self._timed = {}, _Timed()

  def waited_for(self, batches: Iterable[T]) -> Iterator[T]:
    """Yields what `batches` do, and counts the time until they do."""
    begun = time.perf_counter()
    for batch in batches:
      self._waited += time.perf_counter() - begun
      yield batch
      begun = time.perf_counter()

  @contextlib.contextmanager
  def untimed(self) -> Iterator[None]:
    """Leaves what is done inside out of the time of the steps around it."""
    begun = time.perf_counter()
    yield
    if self._mark is not None:
      self._mark += time.perf_counter() - begun

  def pending(self) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON: what a resumed run needs to write the
    same rows, and its goodput."""
    sums = {
      k: [np.asarray(x).tolist() for x in s] for k, s in self._sums.items()
    }
    return {"sums": sums, "started": self._started, "useful": self._useful}

  def restore(self, pending: dict[str, Any]) -> None:
    """Takes up what `pending` gave."""
    self._sums = {
      k: losses.Sums(*map(np.array, v)) for k, v in pending["sums"].items()
    }
    self._started, self._useful = pending["started"], pending["useful"]

  def _compiled(self, step: int) -> bool:
    """Whether this step or the next, launched before this one is read, may be
    the first of its shape."""
    return any(
      self._first.setdefault(self._run.train_plan.shape_of(s - 1), s) == s
      for s in (step, step + 1)
      if s <= self._run.steps
    )

  def _clocked(self) -> dict[str, float]:
    t, columns = self._timed, {}
    if t.seconds > 0:
      batch_size = self._run.config.train.batch_size
      columns["pairs_per_second"] = t.steps * batch_size / t.seconds
      columns["tokens_per_second"] = t.tokens / t.seconds
      columns["data_wait"] = t.waited / t.seconds
      if self._peak:
        peak = self._peak * self._run.built.mesh.size
        columns["mfu"] = t.flops / t.seconds / peak
    elapsed = time.time() - self._started
    columns["goodput"] = self._useful / elapsed if elapsed > 0 else 0.0
    memory = peak_memory()
    if memory is not None:
      columns["peak_memory_bytes"] = memory
    return columns

  def _check_finite(self, step: int, skipped: float) -> None:
    self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
    if not skipped:
      return
    _LOG.warning("step %d: loss or gradient not finite, update skipped", step)
    if self._skipped:
      examples = self._run.train_plan.members(step - 1)
      rows = self._run.data.train.rows[examples]
      line = json.dumps({"step": step, "rows": rows.tolist()}) + "\n"
      try:
        with self._skipped.open("a", encoding="utf-8") as file:
          file.write(line)
      except OSError as e:
        raise cannot_write(self._skipped, e) from e
    limit = self._run.config.train.max_skipped
    if self._skipped_in_a_row >= limit:
      raise UserError(
        f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a"
        " loss or gradient that is not finite; lower optim.learning_rate, or"
        " look at the rows of the data that skipped.jsonl names;"
        f" {self._saved()}"
      )


class _Timed:
  """Steps since the last row whose time is known."""

  def __init__(self):
    self.steps = self.tokens = 0
    self.flops = self.seconds = self.waited = 0.0

  def add(self, run: Run, step: int, seconds: float, waited: float) -> None:
    self.steps += 1
    self.tokens += run.train_plan.tokens(step - 1)
    self.flops += run.ideal_flops(step)
    self.seconds += seconds
    self.waited += waited


def peak_memory() -> int | None:
  """Most bytes in use so far on any device of this host; None where the
  platform does not tell, as CPUs do not."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks, default=None)
