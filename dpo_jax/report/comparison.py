"""Several policies side by side: a table, and a picture of dots in rows."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from dpo_jax.report import ticks as t

_ROW, _TOP, _LABELS, _PANEL, _GAP = 19, 54, 136, 208, 26
_CSS = """
text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1b2430}
.t{font-weight:600}.m{fill:#5b6878;font-size:11px}
.bg{fill:#fff}.grid{stroke:#e6e9ee}.base{stroke:#5b6878;stroke-dasharray:3 3}
.band{fill:#f3f5f8}.link{stroke:#b9c2ce;stroke-width:2}
.a{fill:#1d5fd1}.b{fill:#c2500a}.e{stroke:#1d5fd1}
@media (prefers-color-scheme:dark){text{fill:#e6eaf0}.m{fill:#9aa7b8}
.bg{fill:#0f1319}.grid{stroke:#283040}.base{stroke:#9aa7b8}
.band{fill:#171c24}.link{stroke:#3c4757}.a{fill:#74aaff}.b{fill:#ff9d5c}
.e{stroke:#74aaff}}
"""


class Panel(NamedTuple):
  """One quantity: a dot a row, or two that belong together."""

  title: str
  unit: str
  value: Callable[[Any], float]
  second: Callable[[Any], float] | None = None
  error: Callable[[Any], float] | None = None
  base: Callable[[Any], float] | None = None  # of the first row: a dashed line
  log: bool = False  # far values drawn together: by asinh, linear around 0


def markdown(
  rows: Sequence[Any], columns: Sequence[tuple[str, Callable[[Any], str]]]
) -> str:
  """A table of (heading, how a row shows it)."""
  heads = [name for name, _ in columns]
  lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
  lines += [[show(row) for _, show in columns] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def dot_plot(rows: Sequence[Any], panels: Sequence[Panel], title: str) -> str:
  """An SVG of its own: a line a row, panels side by side, axes below.

  Args:
    rows: with a `name`; the first is what the others started from.
    panels: what to show of each.
    title: for readers that do not see it.
  """
  height = _TOP + _ROW * len(rows) + 34
  width = _LABELS + len(panels) * (_PANEL + _GAP)
  parts = [f'<rect class="bg" width="{width}" height="{height}"/>']
  for i, row in enumerate(rows):
    y = _TOP + _ROW * i
    if i % 2 == 0:
      parts.append(
        f'<rect class="band" y="{y}" width="{width}" height="{_ROW}"/>'
      )
    name = escape(str(row.name))
    parts.append(
      f'<text x="{_LABELS - 10}" y="{y + 14}" text-anchor="end">{name}</text>'
    )
  for i, panel in enumerate(panels):
    parts.append(_panel(rows, panel, _LABELS + i * (_PANEL + _GAP) + 8))
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    f' width="{width}" height="{height}" role="img"'
    f' aria-label="{escape(title)}"><style>{_CSS}</style>'
    f"{''.join(parts)}</svg>\n"
  )


def _panel(rows, panel: Panel, left: float) -> str:
  finite = [v for row in rows for v in _reach(row, panel)] or [0.0]
  marks = _axis(min(0.0, *finite), max(0.0, *finite), panel.log)
  place = math.asinh if panel.log else float
  first, last = place(marks[0]), place(marks[-1])
  at = lambda v: left + (place(v) - first) / (last - first) * (_PANEL - 16)
  bottom = _TOP + _ROW * len(rows)
  out = [
    f'<text class="t" x="{left}" y="20">{escape(panel.title)}</text>',
    f'<text class="m" x="{left}" y="37">{escape(panel.unit)}</text>',
  ]
  for v, label in zip(marks, t.format_ticks(marks), strict=True):
    out.append(
      f'<path class="grid" d="M{at(v):.1f} {_TOP}V{bottom}"/>'
      f'<text class="m" x="{at(v):.1f}" y="{bottom + 17}"'
      f' text-anchor="middle">{label}</text>'
    )
  if panel.base:
    x = at(panel.base(rows[0]))
    out.append(f'<path class="base" d="M{x:.1f} {_TOP}V{bottom}"/>')
  for i, row in enumerate(rows):
    out.append(_marks(row, panel, at, _TOP + _ROW * i + _ROW / 2))
  return "".join(out)


def _axis(low: float, high: float, log: bool) -> list[float]:
  """Ticks of an axis, which begins and ends with one."""
  if low == high:
    high = low + 1
  if log:
    steps = [0.0, *(m * 10.0**k for k in range(9) for m in (1, 3))]
    below = next(i for i, s in enumerate(steps) if -s <= low)
    above = next(i for i, s in enumerate(steps) if s >= high)
    return [-s for s in steps[below:0:-1]] + steps[: above + 1]
  step = t.round_step(low, high, 4)
  low, high = step * math.floor(low / step), step * math.ceil(high / step)
  return t.ticks(low, high, step)


def _reach(row, panel: Panel) -> list[float]:
  """Finite ends of what is drawn of a row."""
  value = panel.value(row)
  ends = [value, panel.second(row) if panel.second else value]
  if panel.error:
    ends += [value - panel.error(row), value + panel.error(row)]
  return [v for v in ends if math.isfinite(v)]


def _marks(row, panel: Panel, at, y: float) -> str:
  value = panel.value(row)
  if not math.isfinite(value):
    return ""
  out = ""
  if panel.second:
    other = panel.second(row)
    out += f'<path class="link" d="M{at(value):.1f} {y}H{at(other):.1f}"/>'
    out += f'<circle class="b" cx="{at(other):.1f}" cy="{y}" r="4.5"/>'
  if panel.error and math.isfinite(error := panel.error(row)):
    out += (
      f'<path class="e" d="M{at(value - error):.1f} {y}'
      f'H{at(value + error):.1f}"/>'
    )
  tip = escape(f"{row.name}: {t.format_value(value)}")
  return (
    f'{out}<circle class="a" cx="{at(value):.1f}" cy="{y}" r="4.5">'
    f"<title>{tip}</title></circle>"
  )
