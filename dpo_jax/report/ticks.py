"""Numbers for charts and prose: round steps, spelling, smoothing, thinning."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def round_step(low: float, high: float, count: int) -> float:
  """The 1, 2, 2.5 or 5 times 10^k that gives about `count` steps."""
  rough = 0.999 * (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)


def ticks(low: float, high: float, step: float) -> list[float]:
  """The multiples of `step` in [low, high]."""
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [k * step for k in range(first, last + 1)]


def format_ticks(values: Sequence[float]) -> list[str]:
  """The ticks of one axis, all with the same number of decimals."""
  largest = max(map(abs, values), default=0.0)
  step = min((b - a for a, b in pairwise(values)), default=largest)
  if largest and (largest < 1e-3 or largest >= 1e7):
    return [_scientific(v) if v else "0" for v in values]
  decimals = 0
  while decimals < 9 and abs(step - round(step, decimals)) > 1e-6 * step:
    decimals += 1
  return [_fixed(v + 0.0, decimals) for v in values]


def format_value(value: float) -> str:
  """A number as a person writes it: about three significant digits."""
  size = abs(value)
  if not size:
    return "0"
  if math.isfinite(size) and (size < 1e-3 or size >= 1e7):
    return _scientific(value)
  return _fixed(value, 3 if size < 1 else 2 if size < 10 else int(size < 1000))


def format_estimate(value: float, error: Any) -> str:
  """`value ± error`, both to the second digit of the standard error."""
  if not is_number(error) or error <= 0:
    return format_value(value)
  decimals = max(0, 1 - math.floor(math.log10(error)))
  return f"{_fixed(value, decimals)} ± {_fixed(error, decimals)}"


def smooth(y: Sequence[float], window: int) -> list[float]:
  """Moving mean of the finite values around each; NaN stays NaN."""
  finite = [math.isfinite(v) for v in y]
  sums = [0.0, *accumulate(v if ok else 0.0 for v, ok in zip(y, finite))]
  counts = [0, *accumulate(finite)]
  out = []
  for i, ok in enumerate(finite):
    first, end = max(0, i - window // 2), min(len(y), i + window // 2 + 1)
    mean = (sums[end] - sums[first]) / max(1, counts[end] - counts[first])
    out.append(mean if ok else math.nan)
  return out


def decimate(y: Sequence[float], most: int) -> list[int]:
  """Indices of about `most` values that keep the ends, spikes and gaps."""
  order = [v if math.isfinite(v) else -math.inf for v in y]
  keep = {0, len(y) - 1}
  width = max(1, 2 * len(y) // most)
  for start in range(0, len(y), width):
    part = range(start, min(start + width, len(y)))
    keep |= {f(part, key=order.__getitem__) for f in (min, max)}
  return sorted(keep)


def _fixed(value: float, decimals: int) -> str:
  return f"{value:,.{decimals}f}".replace("-", "−")


def _scientific(value: float) -> str:
  mantissa, exponent = f"{value:.2e}".split("e")
  return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
