"""Curves with bands over a quantity that is no step: an SVG of its own."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from dpo_jax.report import ticks as t

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 330, 250, 52, 46, 30
_CHAR, _LINE = 6.6, 18  # of the legend
# Light, dark: told apart also by those who see few colours; the first is for
# what is no measurement.
_COLORS = (
  ("#5b6878", "#9aa7b8"), ("#1d5fd1", "#74aaff"), ("#c2500a", "#ff9d5c"),
  ("#0c7a45", "#5fd39a"), ("#8a2fb0", "#d79bf0"), ("#a8860b", "#e8c547"),
  ("#0e8fa3", "#5fd7e8"), ("#c0267e", "#ff86c4"), ("#6b4a2b", "#c9a27e"),
  ("#1b2430", "#e6eaf0"), ("#7a9a01", "#b9d94c"),
)  # fmt: skip
_CSS = """
text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1b2430}
.t{font-weight:600}.m{fill:#5b6878;font-size:11px}.bg{fill:#fff}
path{fill:none}.grid{stroke:#e6e9ee}.axis{stroke:#5b6878}
.l{stroke:currentColor;stroke-width:2}.d{stroke:currentColor;stroke-width:1.6;
stroke-dasharray:5 4}.b{fill:currentColor;opacity:.14}circle{fill:currentColor}
"""
_DARK = """text{fill:#e6eaf0}.m{fill:#9aa7b8}.bg{fill:#0f1319}
.grid{stroke:#283040}.axis{stroke:#9aa7b8}.b{opacity:.22}"""


class Curve(NamedTuple):
  """Points in the order in which they are joined; a NaN is left out."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  error: Sequence[float] | None = None  # the band's half height
  dashed: bool = False  # without dots: theory, and no measurement
  color: int = 0  # of 11


class Plane(NamedTuple):
  title: str
  x: str  # what lies along the axis
  unit: str  # of y
  curves: Sequence[Curve]
  log: bool = False  # x by its logarithm
  most: float = math.inf  # where x ends, though points lie beyond
  range: tuple[float, float] = (-math.inf, math.inf)  # likewise of y


def figure(planes: Sequence[Plane], title: str) -> str:
  """An SVG: planes side by side, one legend below, a line a name."""
  width = 10 + len(planes) * (_LEFT + _WIDTH + _GAP)
  legend, lines = _legend(planes, width)
  height = _TOP + _HEIGHT + 48 + _LINE * lines
  parts = [f'<rect class="bg" width="{width}" height="{height}"/>']
  for i, plane in enumerate(planes):
    parts.append(_plane(plane, 10 + i * (_LEFT + _WIDTH + _GAP)))
  light, dark = (
    "".join(f".c{i}{{color:{pair[side]}}}" for i, pair in enumerate(_COLORS))
    for side in (0, 1)
  )
  style = f"{_CSS}{light}@media (prefers-color-scheme:dark){{{_DARK}{dark}}}"
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    f' width="{width}" height="{height}" role="img"'
    f' aria-label="{escape(title)}"><style>{style}</style>'
    f"{''.join(parts)}{legend}</svg>\n"
  )


def _legend(planes, width) -> tuple[str, int]:
  named = {c.name: c for p in planes for c in p.curves}
  out, x, line = [], 10.0, 0
  for name, curve in named.items():
    wide = 34 + _CHAR * len(name)
    if x + wide > width and x > 10:
      x, line = 10.0, line + 1
    y = _TOP + _HEIGHT + 50 + _LINE * line
    kind = "d" if curve.dashed else "l"
    out.append(
      f'<g class="c{curve.color}"><path class="{kind}"'
      f' d="M{x:.0f} {y}h20"/></g><text x="{x + 25:.0f}" y="{y + 4}">'
      f"{escape(name)}</text>"
    )
    x += wide + 12
  return "".join(out), line + 1


def _shown(curve: Curve) -> list[tuple[float, float, float]]:
  errors = curve.error or [0.0] * len(curve.x)
  points = zip(curve.x, curve.y, errors, strict=True)
  return [
    (x, y, e if math.isfinite(e) else 0.0)
    for x, y, e in points
    if math.isfinite(x) and math.isfinite(y)
  ]


def _plane(plane: Plane, left: float) -> str:
  shown = [(c, _shown(c)) for c in plane.curves]
  low, high = plane.range
  points = [
    (x, y, e)
    for _, own in shown
    for x, y, e in own
    if x <= plane.most and low <= y <= high
  ] or [(1.0, 0.0, 0.0)]
  place = math.log if plane.log else float
  x_marks = _x_marks([x for x, _, _ in points], plane.log)
  ends = [min(max(y + s * e, low), high) for _, y, e in points for s in (-1, 1)]
  y_marks = _round_marks(min(ends), max(ends))
  first, last = place(x_marks[0]), place(x_marks[-1])
  start, bottom = left + _LEFT, _TOP + _HEIGHT
  px = lambda x: start + (place(x) - first) / (last - first) * _WIDTH
  span = y_marks[-1] - y_marks[0]
  py = lambda y: bottom - (y - y_marks[0]) / span * _HEIGHT
  out = [
    f'<text class="t" x="{start}" y="18">{escape(plane.title)}</text>',
    f'<text class="m" x="{start}" y="35">{escape(plane.unit)}</text>',
    f'<text class="m" x="{start + _WIDTH / 2}" y="{bottom + 32}"'
    f' text-anchor="middle">{escape(plane.x)}</text>',
  ]
  for y, label in zip(y_marks, t.format_ticks(y_marks), strict=True):
    out.append(
      f'<path class="grid" d="M{start} {py(y):.1f}h{_WIDTH}"/>'
      f'<text class="m" x="{start - 7}" y="{py(y) + 4:.1f}"'
      f' text-anchor="end">{label}</text>'
    )
  out.append(f'<path class="axis" d="M{start} {bottom}h{_WIDTH}"/>')
  for x in x_marks:
    out.append(
      f'<path class="axis" d="M{px(x):.1f} {bottom}v4"/><text class="m"'
      f' x="{px(x):.1f}" y="{bottom + 17}" text-anchor="middle">{x:,g}</text>'
    )
  # What lies beyond the axes is cut off there, dots by half at most.
  out.append(
    f'<svg x="{start - 4}" y="{_TOP - 4}" width="{_WIDTH + 8}"'
    f' height="{_HEIGHT + 8}" viewBox="{start - 4} {_TOP - 4} {_WIDTH + 8}'
    f' {_HEIGHT + 8}">'
  )
  for curve, own in shown:
    if own:
      marks = _curve(curve, own, px, py)
      out.append(f'<g class="c{curve.color}">{marks}</g>')
  return "".join(out) + "</svg>"


def _curve(curve: Curve, points, px, py) -> str:
  at = lambda x, y: f"{px(x):.1f} {py(y):.1f}"
  line = "L".join(at(x, y) for x, y, _ in points)
  out = f'<path class="{"d" if curve.dashed else "l"}" d="M{line}"/>'
  if curve.error:
    edge = [at(x, y + e) for x, y, e in points]
    edge += [at(x, y - e) for x, y, e in reversed(points)]
    out += f'<path class="b" d="M{"L".join(edge)}Z"/>'
  if not curve.dashed:
    for x, y, _ in points:
      tip = f"{curve.name}: {t.format_value(y)} at {x:,.4g}"
      out += (
        f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.2">'
        f"<title>{escape(tip)}</title></circle>"
      )
  return out


def _x_marks(values: Sequence[float], log: bool) -> list[float]:
  low, high = min(values), max(values)
  if not log:
    return _round_marks(min(0.0, low), high)
  steps = [m * 10.0**k for k in range(-6, 9) for m in (1, 3)]
  first = max(i for i, s in enumerate(steps) if s <= low * 1.0001)
  last = min(i for i, s in enumerate(steps) if s >= high * 0.9999)
  return steps[first : max(last, first + 1) + 1]


def _round_marks(low: float, high: float) -> list[float]:
  """Ticks of an axis, which begins and ends with one."""
  if high - low < 1e-9:
    low, high = low - 0.5, high + 0.5
  step = t.round_step(low, high, 5)
  low, high = step * math.floor(low / step), step * math.ceil(high / step)
  return t.ticks(low, high, step)
