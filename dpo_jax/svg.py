"""Line charts as SVG text: pure functions, no script, colours from CSS.

A page may define `--ink`, `--muted`, `--grid`, `--surface` and the colours
that its series name; each has a fallback that suits a white background.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

_INK = "var(--ink,#1f2937)"
_MUTED = "var(--muted,#64748b)"
_GRID = "var(--grid,#e2e8f0)"
_SURFACE = "var(--surface,#fff)"
_FONT = 'font-family="system-ui,sans-serif" font-size="11.5"'
_CHAR = 6.3  # Mean width of a character at that size, in user units.
_BOLD = 7.2
_LEFT = 58
_LINE = 15  # Least distance of two labels.
_HOVER_BANDS = 80
_MINUS = "−"

_Place = Callable[[float], float]


@dataclass(frozen=True)
class Series:
  """One curve; a NaN or infinite `y` interrupts it."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  color: str = _INK
  style: Literal["line", "thin", "dots"] = "line"
  legend: bool = True
  end_label: str | None = None  # Text before the last value; None: no label.


@dataclass(frozen=True)
class Guide:
  """A horizontal line that gives a value its meaning."""

  y: float
  label: str = ""


def line_chart(
  series: Sequence[Series],
  *,
  title: str,
  x_label: str = "step",
  y_label: str = "",
  y_range: Sequence[float] = (),
  guides: Sequence[Guide] = (),
  size: tuple[int, int] = (560, 290),
) -> str:
  """An `<svg>` of the series over shared axes; "" if no value is finite.

  The vertical axis takes in all values and all of `y_range`.
  """
  finite = [p for s in series for p in zip(s.x, s.y) if math.isfinite(p[1])]
  if not finite:
    return ""
  width, height = size
  ends = [(s, *_last(s)) for s in series if s.end_label is not None and _any(s)]
  texts = [f"{s.end_label} {format_value(y)}".strip() for s, _, y in ends]
  legend, rows = _legend(series, width)
  left, top, bottom = _LEFT, 12 + 17 * rows, height - 38
  right = width - max([22, *(len(text) * _BOLD + 16 for text in texts)])

  x_low, x_high = _spread([x for x, _ in finite])
  y_low, y_high = _spread([*(y for _, y in finite), *y_range])
  y_step = round_step(y_low, y_high, 5)
  # Out to the next round value on both sides.
  y_low = math.floor(y_low / y_step + 1e-9) * y_step
  y_high = math.ceil(y_high / y_step - 1e-9) * y_step
  y_ticks = ticks(y_low, y_high, y_step)
  x_step = round_step(x_low, x_high, max(2, int((right - left) / 70)))
  if all(float(x).is_integer() for x, _ in finite):
    x_step = max(1.0, math.ceil(x_step))
  x_ticks = ticks(x_low, x_high, x_step)

  def px(x: float) -> float:
    return round(left + (x - x_low) / (x_high - x_low) * (right - left), 2)

  def py(y: float) -> float:
    return round(bottom - (y - y_low) / (y_high - y_low) * (bottom - top), 2)

  out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    f' role="img" aria-label="{escape(_summary(title, series))}" {_FONT}>'
  ]
  out.append(f'<g style="fill:{_MUTED}">')
  for tick, text in zip(y_ticks, format_ticks(y_ticks)):
    out.append(
      f'<path class="grid" d="M{left} {py(tick)}H{right:.2f}"'
      f' style="stroke:{_GRID}"/><text class="y" x="{left - 7}"'
      f' y="{py(tick) + 4:.2f}" text-anchor="end">{text}</text>'
    )
  for tick, text in zip(x_ticks, format_ticks(x_ticks)):
    out.append(
      f'<path d="M{px(tick)} {bottom}v4" style="stroke:{_MUTED}"/>'
      f'<text class="x" x="{px(tick)}" y="{bottom + 17}"'
      f' text-anchor="middle">{text}</text>'
    )
  out.append(
    f'<text x="{(left + right) / 2:.2f}" y="{height - 4}"'
    f' text-anchor="middle">{escape(x_label)}</text>'
    f'<text transform="translate(11 {(top + bottom) / 2:.2f}) rotate(-90)"'
    f' text-anchor="middle">{escape(y_label)}</text></g>'
    f'<path d="M{left} {bottom}H{right:.2f}" style="stroke:{_MUTED}"/>'
  )
  out.append(legend)
  out.append(_hover(series, x_label, px, (left, right, top, bottom)))
  shown = [guide for guide in guides if y_low <= guide.y <= y_high]
  out.extend(
    f'<path class="guide" d="M{left} {py(guide.y)}H{right:.2f}"'
    f' style="stroke:{_MUTED}" stroke-dasharray="5 4"/>'
    for guide in shown
  )
  out.extend(_curve(s, px, py, x_label, int(right - left)) for s in series)
  out.extend(
    f'<text x="{right - 5:.2f}" y="{py(guide.y) - 5:.2f}" text-anchor="end"'
    f' style="fill:{_MUTED};stroke:{_SURFACE};stroke-width:3;'
    f'paint-order:stroke">{escape(guide.label)}</text>'
    for guide in shown
    if guide.label
  )
  heights = spread_labels([py(y) for _, _, y in ends], top, bottom)
  for (s, x, y), text, label_y in zip(ends, texts, heights):
    out.append(
      f'<circle cx="{px(x)}" cy="{py(y)}" r="3" style="fill:{s.color}"/>'
      f'<text class="end" x="{right + 9:.2f}" y="{label_y + 4:.2f}"'
      f' style="fill:{s.color}" font-weight="600">{escape(text)}</text>'
    )
  out.append("</svg>")
  return "".join(out)


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
  largest = max((abs(value) for value in values), default=0.0)
  step = min((b - a for a, b in pairwise(values)), default=largest)
  if largest and (largest < 1e-3 or largest >= 1e7):
    return [_minus(_scientific(v, 2)) if v else "0" for v in values]
  decimals = 0
  while decimals < 9 and abs(step - round(step, decimals)) > 1e-6 * step:
    decimals += 1
  return [_minus(f"{v + 0.0:,.{decimals}f}") for v in values]


def format_value(value: float) -> str:
  """A number as a person writes it: about three significant digits."""
  size = abs(value)
  if not math.isfinite(value):
    return _minus(str(value))
  if size == 0:
    return "0"
  if size < 1e-3 or size >= 1e7:
    return _minus(_scientific(value, 2))
  decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 1000 else 0
  return _minus(f"{value:,.{decimals}f}")


def smooth(
  x: Sequence[float], y: Sequence[float], window: int, most: int = 1000
) -> tuple[list[float], list[float]]:
  """Moving mean of the finite values around at most about `most` points.

  NaN stays NaN, and the last point is always there.
  """
  half = window // 2
  places = [*range(0, len(x) - 1, max(1, len(x) // most)), len(x) - 1]
  means = []
  for i in places:
    near = [v for v in y[max(0, i - half) : i + half + 1] if math.isfinite(v)]
    means.append(sum(near) / len(near) if math.isfinite(y[i]) else math.nan)
  return [x[i] for i in places], means


def decimate(
  x: Sequence[float], y: Sequence[float], buckets: int
) -> list[tuple[float, float]]:
  """Keeps first, least, greatest and last value, and a gap, per bucket."""
  n = len(x)
  if n <= 4 * buckets:
    return list(zip(x, y))
  out = []
  for bucket in range(buckets):
    part = range(bucket * n // buckets, (bucket + 1) * n // buckets)
    good = [i for i in part if math.isfinite(y[i])]
    keep = {i for i in part if not math.isfinite(y[i])}
    keep = {min(keep)} if keep else set()
    if good:
      by_value = sorted(good, key=lambda i: y[i])
      keep |= {good[0], by_value[0], by_value[-1], good[-1]}
    out.extend((x[i], y[i]) for i in sorted(keep))
  return out


def spread_labels(
  wanted: Sequence[float], top: float, bottom: float
) -> list[float]:
  """Heights near the wanted ones that are at least one line apart."""
  order = sorted(range(len(wanted)), key=lambda i: wanted[i])
  placed = [0.0] * len(wanted)
  floor = top
  for i in order:
    placed[i] = max(wanted[i], floor)
    floor = placed[i] + _LINE
  ceiling = bottom
  for i in reversed(order):
    placed[i] = min(placed[i], ceiling)
    ceiling = placed[i] - _LINE
  return placed


def _any(s: Series) -> bool:
  return any(math.isfinite(y) for y in s.y)


def _last(s: Series) -> tuple[float, float]:
  return next(p for p in zip(s.x[::-1], s.y[::-1]) if math.isfinite(p[1]))


def _spread(values: Sequence[float]) -> tuple[float, float]:
  low, high = min(values), max(values)
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    around = 1.0 if low == 0 or float(low).is_integer() else 0.1 * abs(low)
    return low - around, high + around
  return low, high


def _curve(s: Series, px: _Place, py: _Place, x_label: str, pixels: int) -> str:
  points = decimate(s.x, s.y, max(2, pixels // 2))
  look = f"stroke:{s.color};fill:none;pointer-events:none"
  look += (
    ";stroke-width:1;opacity:.4" if s.style == "thin" else ";stroke-width:2"
  )
  if s.style == "dots":
    look += ";stroke-width:1.2;stroke-dasharray:2 3"
  # A value alone between two gaps is a line of length 0 with a round end.
  path, pen = [], "M"
  for i, (x, y) in enumerate(points):
    if not math.isfinite(y):
      pen = "M"
      continue
    path.append(f"{pen}{px(x)} {py(y)}")
    if pen == "M" and not (
      i + 1 < len(points) and math.isfinite(points[i + 1][1])
    ):
      path.append("h0")
    pen = "L"
  out = [
    f'<path class="{s.style}" d="{"".join(path)}" stroke-linecap="round"'
    f' stroke-linejoin="round" style="{look}"/>'
  ]
  if s.style == "dots":
    radius, rim = (3.5, 1) if len(points) <= 60 else (2, 0)
    out.extend(
      f'<circle cx="{px(x)}" cy="{py(y)}" r="{radius}"'
      f' style="fill:{s.color};stroke:{_SURFACE};stroke-width:{rim}">'
      f"<title>{escape(x_label)} {_at(x)}\n"
      f"{escape(s.name)}: {format_value(y)}</title></circle>"
      for x, y in points
      if math.isfinite(y)
    )
  return "".join(out)


def _legend(series: Sequence[Series], width: int) -> tuple[str, int]:
  """The legend and its number of rows; none for a single curve."""
  shown = [s for s in series if s.legend and _any(s)]
  if len(shown) < 2:
    return "", 0
  out, x, row = [], _LEFT, 1
  for s in shown:
    wide = 24 + len(s.name) * _CHAR + 14
    if x > _LEFT and x + wide > width:
      x, row = _LEFT, row + 1
    y = 17 * row - 7
    mark = (
      f'<path d="M{x:.2f} {y}h16" style="stroke:{s.color};stroke-width:2"/>'
    )
    if s.style == "thin":
      mark = mark.replace("stroke-width:2", "stroke-width:1;opacity:.5")
    if s.style == "dots":
      mark = (
        f'<circle cx="{x + 8:.2f}" cy="{y}" r="3.5" style="fill:{s.color}"/>'
      )
    name = f'<text x="{x + 22:.2f}" y="{y + 4}">{escape(s.name)}</text>'
    out.append(mark + name)
    x += wide
  return f'<g class="legend" style="fill:{_INK}">{"".join(out)}</g>', row


def _hover(
  series: Sequence[Series],
  x_label: str,
  px: _Place,
  box: tuple[float, float, float, float],
) -> str:
  """Invisible bands whose tooltip lists every curve's value at that x."""
  left, right, top, bottom = box
  at = [dict(zip(s.x, s.y)) for s in series]
  xs = sorted(set().union(*at))
  if len(xs) > _HOVER_BANDS:
    last = len(xs) - 1
    few = _HOVER_BANDS - 1
    xs = [xs[k * last // few] for k in range(_HOVER_BANDS)]
  middles = [(px(a) + px(b)) / 2 for a, b in pairwise(xs)]
  edges = [left, *middles, right]
  out = []
  for x, start, end in zip(xs, edges, edges[1:]):
    lines = [f"{escape(x_label)} {_at(x)}"]
    lines += [
      f"{escape(s.name)}: {format_value(values[x])}"
      for s, values in zip(series, at)
      if x in values
    ]
    out.append(
      f'<rect x="{start:.2f}" y="{top}" width="{end - start:.2f}"'
      f' height="{bottom - top}"><title>{chr(10).join(lines)}</title></rect>'
    )
  return f'<g class="hover" fill="transparent">{"".join(out)}</g>'


def _scientific(value: float, digits: int) -> str:
  mantissa, exponent = f"{value:.{digits}e}".split("e")
  if "." in mantissa:
    mantissa = mantissa.rstrip("0").rstrip(".")
  return f"{mantissa}e{int(exponent)}"


def _at(x: float) -> str:
  return f"{x:,.0f}" if float(x).is_integer() else format_value(x)


def _minus(text: str) -> str:
  return text.replace("-", _MINUS)


def _summary(title: str, series: Sequence[Series]) -> str:
  parts = []
  for s in series:
    if s.legend and _any(s):
      x, y = _last(s)
      parts.append(f"{s.name} {format_value(y)} at {_at(x)}")
  return f"{title}: {', '.join(parts)}"
