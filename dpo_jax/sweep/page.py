"""The table of a sweep with plots across its runs, as one HTML page.

As a run's report: no script, no network, all text of runs escaped.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from string import Template
from typing import NamedTuple
from urllib.parse import quote

from dpo_jax.errors import DataError
from dpo_jax.report.charts import Curves, curves_of
from dpo_jax.report.comparison import Panel, dot_plot
from dpo_jax.report.markup import div, text
from dpo_jax.report.style import CSS
from dpo_jax.report.svg import Series, line_chart
from dpo_jax.report.ticks import is_number
from dpo_jax.sweep.options import Sweep
from dpo_jax.sweep.status import Place, State
from dpo_jax.sweep.table import RESULTS, Row, show
from dpo_jax.writers import read_metrics

_PAGE = Template("""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title><style>$css</style></head>
<body><main><h1>$title</h1>$body</main></body></html>
""")
_CSS = """
.wide{overflow-x:auto}
th{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line)}
.wide td,.wide th{white-space:nowrap;width:auto;padding-right:18px}
img{max-width:100%;height:auto}
"""
# (column of the table, title, unit, whether values are far apart)
_PANELS = (
  ("loss", "Held-out loss", "each method has its own", True),
  ("accuracy", "Held-out accuracy", "fraction of pairs", False),
  ("margin", "Held-out margin", "reward (β × nats)", False),
  ("reward", "True reward", "mean of answers", False),
  ("kl", "KL to reference", "nats per response", False),
)
_CURVES = (
  ("rewards/accuracies", "Held-out accuracy", "fraction of pairs"),
  ("rewards/margins", "Held-out margin", "reward (β × nats)"),
  ("kl", "Held-out KL estimate", "nats per response"),
  ("loss", "Held-out loss", "of each run's own"),
)
_LABEL = 21  # most characters beside a row of the picture
_FEW = 6  # curves that still have a label of their own each


class _Shown(NamedTuple):
  name: str
  row: Row
  curves: Curves


def render_page(sweep: Sweep, rows: Sequence[Row]) -> str:
  """The page; `rows` as of `rows_of`."""
  shown = [
    _Shown(_label(rows, row), row, _curves(sweep.place(run)))
    for run, row in zip(sweep.runs, rows, strict=True)
  ]
  title = text(f"Sweep: {sweep.root.name}")
  colors = "".join(
    f"--run{i}:hsl({360 * i / len(rows):.0f} 65% 48%);"
    for i in range(len(rows))
  )
  done = sum(row["state"] == State.DONE.value for row in rows)
  facts = f"{done} of {len(rows)} runs done · {' '.join(sweep.train[2:])}"
  body = [
    f'<p class="facts">{text(facts)}</p>',
    div("card wide", _table(sweep, rows)),
    _dots(shown),
    _charts(shown),
  ]
  css = f"{CSS}{_CSS}:root{{{colors}}}"
  return _PAGE.substitute(title=title, css=css, body="".join(body))


def _table(sweep: Sweep, rows: Sequence[Row]) -> str:
  names = [name for name in rows[0] if name != "run"]
  head = "".join(f"<th>{text(name)}</th>" for name in [*names, "run"])
  lines = []
  for run, row in zip(sweep.runs, rows, strict=True):
    cells = [
      f'<td class="{"n" if name in RESULTS else ""}">'
      f"{text(show(name, row[name]))}</td>"
      for name in names
    ]
    cells.append(f"<td>{_link(sweep.place(run), run.id)}</td>")
    lines.append(f"<tr>{''.join(cells)}</tr>")
  return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _link(place: Place, name: str) -> str:
  """To the report of a run, or its log where it has none."""
  for file in (place.path / "report.html", place.log):
    if file.exists():
      address = quote(f"runs/{place.path.name}/{file.name}")
      return f'<a href="{address}">{text(name)}</a>'
  return text(name)


def _dots(shown: Sequence[_Shown]) -> str:
  """Final numbers side by side. A picture of its own, for its own styles."""
  panels = [
    Panel(title, unit, _value(column), log=log)
    for column, title, unit, log in _PANELS
    if any(is_number(s.row.get(column)) for s in shown)
  ]
  if not panels:
    return ""
  svg = dot_plot(shown, panels, "Final numbers of all runs")
  data = base64.b64encode(svg.encode(errors="replace")).decode()
  picture = f'<img alt="Final numbers" src="data:image/svg+xml;base64,{data}">'
  return f"<h2>At the end</h2>{div('card wide', picture)}"


def _value(column: str) -> Callable[[_Shown], float]:
  def value(shown: _Shown) -> float:
    found = shown.row.get(column)
    return found if is_number(found) else math.nan

  return value


def _charts(shown: Sequence[_Shown]) -> str:
  cards = []
  for key, title, unit in _CURVES:
    series = []
    for i, s in enumerate(shown):
      if curve := s.curves.get(("eval", key)):
        x, y = list(curve), list(curve.values())
        label = s.name if len(shown) <= _FEW else None
        series.append(Series(s.name, x, y, f"run{i}", "line", label))
    svg = line_chart(series, title, unit)
    if svg:
      legend = [
        f'<span style="color:var(--{s.color})"><i></i>'
        f"<small>{text(s.name)}</small></span>"
        for s in series
      ]
      head = f"<h3>{text(title)}</h3>"
      cards.append(div("card", head, div("key", *legend), svg))
  return f"<h2>Curves</h2>{div('charts', *cards)}" if cards else ""


def _curves(place: Place) -> Curves:
  try:
    return curves_of(read_metrics(place.metrics))
  except DataError:
    return {}


def _label(rows: Sequence[Row], row: Mapping) -> str:
  """The values that tell this run from the others, short."""
  settings = [k for k in row if k not in (*RESULTS, "run", "state")]
  told = [k for k in settings if len({str(r[k]) for r in rows}) > 1]
  label = ", ".join(str(row[k]) for k in told or settings)
  return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"
