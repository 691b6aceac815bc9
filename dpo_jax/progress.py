"""Progress on a terminal as a bar, anywhere else as a line now and then."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TextIO

# Metric, its name on the bar, and its format.
_SHOWN = (
  ("loss", "loss", "{:.4f}"),
  ("objective/scores", "reward", "{:.3f}"),
  ("rewards/accuracies", "acc", "{:.2f}"),
  ("rewards/margins", "margin", "{:.3f}"),
)
_BAR_SECONDS = 0.5


class Progress:
  """Shows step, key numbers, speed and time left.

  Speed and time left come from this process's steps alone, so a resumed run
  does not count steps of an earlier one. `values` given to `update` may be
  device arrays: they are read only when something is about to be shown.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    stream: TextIO | None = None,
    *,
    interval: float = 10.0,
    batch_size: int | None = None,
    unit: str = "pairs",
    silent: bool = False,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.total_steps = total_steps
    self.stream = sys.stderr if stream is None else stream
    self._silent = silent
    self._interval = interval
    self._batch_size = batch_size
    self._unit = unit
    self._clock = clock
    self._start = self._anchor = (start_step, clock())
    self._step = start_step
    self._values: Mapping[str, Any] = {}
    self._shown_step: int | None = None
    self._shown_at = -math.inf
    self._bar = self._make_bar(start_step)

  def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
    """Call after each step with the number of steps done in all."""
    self._step = step
    if self._silent:
      return
    self._values = self._values if values is None else values
    now = self._clock()
    if self._bar is not None:
      self._bar.update(step - self._bar.n)
    wait = self._interval if self._bar is None else _BAR_SECONDS
    if step >= self.total_steps or now - self._shown_at >= wait:
      self._show(now)
    if self._anchor is self._start and step > self._start[0]:
      # The first step holds the compilation; later estimates leave it out.
      self._anchor = (step, now)

  def message(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self.stream)
    else:
      self._print(text)

  def close(self) -> None:
    """Shows the last step if it was not shown yet, and ends the bar."""
    unseen = self._step > self._start[0] and self._shown_step != self._step
    if unseen and not self._silent:
      self._show(self._clock())
    if self._bar is not None:
      self._bar.close()
      self._bar = None

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def steps_per_second(self) -> float:
    """Speed so far, 0 before the first step is done."""
    return self._rate(self._clock())

  def _rate(self, now: float) -> float:
    steps, seconds = self._step - self._anchor[0], now - self._anchor[1]
    if not steps:
      steps, seconds = self._step - self._start[0], now - self._start[1]
    return steps / seconds if seconds > 0 else 0.0

  def _speed(self, now: float) -> str:
    if "pairs_per_second" in self._values:
      return f"{float(self._values['pairs_per_second']):.1f} {self._unit}/s"
    if self._batch_size:
      return f"{self._rate(now) * self._batch_size:.1f} {self._unit}/s"
    return f"{self._rate(now):.2f} steps/s"

  def _show(self, now: float) -> None:
    self._shown_step, self._shown_at = self._step, now
    on_bar = self._bar is not None
    parts = []
    for key, short, form in _SHOWN:
      if key in self._values:
        name = short if on_bar else key
        parts.append(f"{name} {form.format(float(self._values[key]))}")
    parts.append(self._speed(now))
    if on_bar:
      self._bar.set_postfix_str("  ".join(parts))
      return
    rate = self._rate(now)
    if rate > 0:
      seconds = round(max(self.total_steps - self._step, 0) / rate)
      parts.append(f"eta {timedelta(seconds=seconds)}")
    self._print(f"step {self._step}/{self.total_steps}  " + "  ".join(parts))

  def _print(self, text: str) -> None:
    # A terminal that went away is no reason to stop training.
    with contextlib.suppress(OSError, ValueError):
      print(text, file=self.stream, flush=True)

  def _make_bar(self, start_step: int) -> Any:
    tqdm = None if self._silent else _bar_of(self.stream)
    if tqdm is None:
      return None
    return tqdm(
      total=self.total_steps,
      initial=start_step,
      file=self.stream,
      dynamic_ncols=True,
      bar_format=(
        "step {n_fmt}/{total_fmt} {bar} {elapsed} eta {remaining}  {postfix}"
      ),
    )


@contextlib.contextmanager
def byte_bar(
  total: int, what: str, stream: TextIO | None = None, *, delay: float = 2.0
) -> Iterator[Callable[[int], None]]:
  """Yields a function to call with every number of bytes done. On a terminal,
  what takes longer than `delay` seconds gets a bar; elsewhere nothing shows."""
  stream = sys.stderr if stream is None else stream
  tqdm = _bar_of(stream)
  if tqdm is None:
    yield lambda size: None
    return
  with tqdm(
    total=total,
    desc=what,
    unit="B",
    unit_scale=True,
    unit_divisor=1024,
    delay=delay,
    leave=False,
    file=stream,
    dynamic_ncols=True,
  ) as bar:
    yield bar.update


@contextlib.contextmanager
def row_bar(
  what: str,
  stream: TextIO | None = None,
  *,
  delay: float = 2.0,
  interval: float = 30.0,
  clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
  """Yields a function to call with the number of rows done so far. On a
  terminal, what takes longer than `delay` seconds gets a bar; elsewhere a line
  says so every `interval` seconds."""
  stream = sys.stderr if stream is None else stream
  begun = told = clock()
  tqdm = _bar_of(stream)
  if tqdm is not None:
    with tqdm(
      desc=what, unit=" rows", delay=delay, leave=False, file=stream,
      dynamic_ncols=True,
    ) as bar:  # fmt: skip
      yield lambda rows: bar.update(rows - bar.n)
    return

  def tell(rows: int) -> None:
    nonlocal told
    now = clock()
    if now - told >= interval:
      told = now
      speed = rows / (now - begun)
      with contextlib.suppress(OSError, ValueError):
        print(
          f"{what}: {rows:,} rows, {speed:,.0f} a second",
          file=stream, flush=True,
        )  # fmt: skip

  yield tell


def _bar_of(stream: TextIO) -> Any:
  """The class of a bar, or None where there is no terminal or no tqdm."""
  is_terminal = getattr(stream, "isatty", lambda: False)
  if not is_terminal():
    return None
  try:
    from tqdm import tqdm
  except ImportError:
    return None
  return tqdm
