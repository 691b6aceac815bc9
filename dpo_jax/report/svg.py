"""Line charts over training steps, as SVG text that the page's CSS styles."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from dpo_jax.report import ticks as t

_LEFT, _TOP = 58, 14
_LINE = 15  # Least distance of two labels.
_CHAR = 7.2  # Width of a character of a label.
_HOVER_BANDS = 80

_Place = Callable[[float], float]


@dataclass(frozen=True)
class Series:
  """One curve; a NaN or infinite `y` interrupts it."""

  name: str
  x: Sequence[int]
  y: Sequence[float]
  color: str  # A custom property of the page, without its dashes.
  style: Literal["line", "thin", "dots"] = "line"
  label: str | None = None  # Text before the last value; None: no label.

  def last(self) -> tuple[int, float]:
    points = zip(self.x[::-1], self.y[::-1])
    return next(p for p in points if math.isfinite(p[1]))


def line_chart(
  series: Sequence[Series],
  title: str,
  unit: str = "",
  guides: Mapping[float, str] | None = None,
  size: tuple[int, int] = (560, 290),
) -> str:
  """An `<svg>` of the series over shared axes; "" if no value is finite.

  `guides` maps heights, which the axis takes in, to the labels of lines there.
  """
  series = [s for s in series if any(map(math.isfinite, s.y))]
  if not series:
    return ""
  guides = guides or {}
  width, height = size
  ends = [(s, *s.last()) for s in series if s.label is not None]
  texts = [f"{s.label} {t.format_value(y)}".strip() for s, _, y in ends]
  right = width - max([22, *(len(text) * _CHAR + 16 for text in texts)])
  bottom = height - 38

  x_low, x_high = _spread([x for s in series for x in s.x])
  x_step = t.round_step(x_low, x_high, max(2, int((right - _LEFT) / 70)))
  x_ticks = t.ticks(x_low, x_high, math.ceil(x_step))
  finite = [y for s in series for y in s.y if math.isfinite(y)]
  y_low, y_high = _spread([*finite, *guides])
  y_step = t.round_step(y_low, y_high, 5)
  # Out to the next round value on both sides.
  y_low = math.floor(y_low / y_step + 1e-9) * y_step
  y_high = math.ceil(y_high / y_step - 1e-9) * y_step
  y_ticks = t.ticks(y_low, y_high, y_step)

  def px(x: float) -> float:
    return round(_LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT), 2)

  def py(y: float) -> float:
    return round(bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP), 2)

  def across(kind: str, y: float) -> str:
    return f'<path class="{kind}" d="M{_LEFT} {y}H{right:.2f}"/>'

  def text(kind: str, x: float, y: float, words: str) -> str:
    return (
      f'<text class="{kind}" x="{x:.2f}" y="{y:.2f}">{escape(words)}</text>'
    )

  out = [across("grid", py(y)) for y in y_ticks]
  for y, words in zip(y_ticks, t.format_ticks(y_ticks)):
    out.append(text("y", _LEFT - 7, py(y) + 4, words))
  for x, words in zip(x_ticks, t.format_ticks(x_ticks)):
    out.append(f'<path class="axis" d="M{px(x)} {bottom}v4"/>')
    out.append(text("x", px(x), bottom + 17, words))
  out += [
    across("axis", bottom),
    text("", (_LEFT + right) / 2, height - 4, "step"),
    f'<g transform="translate(11 {(_TOP + bottom) / 2}) rotate(-90)">',
    text("", 0, 0, unit) + "</g>",
    _hover(series, px, right, bottom),
    *(across("guide", py(y)) for y in guides),
    *(_curve(s, px, py) for s in series),
    *(text("guide-label", right - 5, py(y) - 5, guides[y]) for y in guides),
  ]
  heights = spread_labels([py(y) for _, _, y in ends], bottom)
  for (s, x, y), words, label_y in zip(ends, texts, heights):
    out.append(
      f'<g style="color:var(--{s.color})"><circle cx="{px(x)}" cy="{py(y)}"'
      f' r="3"/>{text("end", right + 9, label_y + 4, words)}</g>'
    )
  ended = ", ".join(f"{s.name} {_at(*s.last())}" for s in series)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    f' role="img" aria-label="{escape(f"{title}: {ended}")}">'
    f"{''.join(out)}</svg>"
  )


def spread_labels(wanted: Sequence[float], bottom: float) -> list[float]:
  """Heights near the wanted ones that are at least one line apart."""
  placed, last = {}, -math.inf
  for i in sorted(range(len(wanted)), key=wanted.__getitem__):
    placed[i] = last = max(wanted[i], last + _LINE)
  return [placed[i] - max(0, last - bottom) for i in range(len(wanted))]


def _spread(values: Sequence[float]) -> tuple[float, float]:
  """The range of the values, widened where it is a point."""
  low, high = min(values), max(values)
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    around = 1.0 if float(low).is_integer() else 0.1 * abs(low)
    return low - around, high + around
  return low, high


def _curve(s: Series, px: _Place, py: _Place) -> str:
  path, circles, pen = [], [], "M"
  radius = 3.5 if len(s.x) <= 60 else 2
  for i in t.decimate(s.y, 1000):
    x, y = s.x[i], s.y[i]
    if not math.isfinite(y):
      pen = "M"
      continue
    # "h0" makes a dot of a value alone between two gaps.
    path.append(f"{pen}{px(x)} {py(y)}{'h0' if pen == 'M' else ''}")
    pen = "L"
    circles.append(
      f'<circle cx="{px(x)}" cy="{py(y)}" r="{radius}">'
      f"<title>{escape(s.name)} {_at(x, y)}</title></circle>"
    )
  return (
    f'<g style="color:var(--{s.color})"><path class="{s.style}"'
    f' d="{"".join(path)}"/>{"".join(circles) * (s.style == "dots")}</g>'
  )


def _hover(
  series: Sequence[Series], px: _Place, right: float, bottom: float
) -> str:
  """Invisible bands whose tooltip lists every curve's value at that x."""
  at = [(s.name, dict(zip(s.x, s.y))) for s in series]
  xs = sorted({x for s in series for x in s.x})
  few = min(len(xs), _HOVER_BANDS)
  xs = [xs[k * (len(xs) - 1) // max(1, few - 1)] for k in range(few)]
  middles = [(px(a) + px(b)) / 2 for a, b in pairwise(xs)]
  out = []
  for x, (start, end) in zip(xs, pairwise([_LEFT, *middles, right])):
    told = [f"{name}: {t.format_value(y[x])}" for name, y in at if x in y]
    out.append(
      f'<rect x="{start:.2f}" y="{_TOP}" width="{end - start:.2f}"'
      f' height="{bottom - _TOP}"><title>'
      f"{escape(chr(10).join([f'step {x:,}', *told]))}</title></rect>"
    )
  return f'<g class="hover">{"".join(out)}</g>'


def _at(x: int, y: float) -> str:
  return f"{t.format_value(y)} at {x:,}"
