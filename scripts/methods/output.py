"""The table and the figures of a comparison."""

import csv
import math
import pathlib
from collections.abc import Sequence

from configs.compare_methods import METHODS
from dpo_jax.data import tastes
from dpo_jax.report import comparison
from dpo_jax.report.curves import Curve, Plane, figure
from methods.results import TITLES, Mean, Point, Results, Row

_BEST = "best possible"
# Of the curve that no policy lies above.
_TILTS = [5 * 0.002 ** (k / 60) for k in range(61)]  # 5 to 0.01


def write(results: Results, folder: pathlib.Path) -> str:
  """Writes table.md, table.csv, points.csv and the figures frontier.svg,
  pairs.svg and beta.svg.

  Returns:
    The table.
  """
  rows = results.table()
  table = comparison.markdown(rows, _columns(results.form.kl))
  (folder / "table.md").write_text(table + "\n")
  _csv(folder / "table.csv", Row._fields, [_flat(row) for row in rows])
  points = [
    (method, results.form.pairs, *_flat(point))
    for method in METHODS
    for point in results.frontier(method)
  ]
  points += [
    (method, pairs, *_flat(results.point(method, METHODS[method][0], pairs)))
    for method in results.form.sized
    for pairs in results.form.sizes
  ]
  nothing = Mean(math.nan, math.nan)
  for x in results.best():
    point = Point(int(x["n"].value), x["reward"], x["kl"], nothing)
    points.append(("best_of_n", results.form.pairs, *_flat(point)))
  _csv(folder / "points.csv", ("method", "pairs", *Point._fields), points)
  for name, draw in FIGURES.items():
    (folder / f"{name}.svg").write_text(draw(results))
  return table


def _columns(kl: float):
  return [
    ("method", lambda r: r.name),
    ("data", lambda r: r.data),
    ("reference", lambda r: "yes" if r.reference else "no"),
    ("stages", lambda r: str(r.stages)),
    ("dial", lambda r: _number(r.dial, "{:g}")),
    ("true reward", lambda r: _mean(r.reward)),
    ("KL", lambda r: _mean(r.kl)),
    (f"true reward at KL {kl:g}", lambda r: _mean(r.at_budget)),
    ("responses", lambda r: f"{r.responses:,}"),
    ("seconds", lambda r: f"{r.seconds:.0f}"),
    ("peak MiB", lambda r: _number(r.memory / 2**20, "{:.0f}")),
    ("settings", lambda r: str(r.settings)),
  ]


def _mean(x: Mean) -> str:
  error = "" if math.isnan(x.error) else f" ± {x.error:.2f}"
  return _number(x.value, "{:.2f}") + error


def _number(value: float, form: str) -> str:
  return "" if math.isnan(value) else form.format(value)


def _flat(row) -> list:
  """A mean in two columns."""
  out = []
  for value in row:
    out += value if isinstance(value, Mean) else [value]
  return out


def _csv(path: pathlib.Path, fields, rows) -> None:
  names = []
  for name in fields:
    pair = name in ("reward", "kl", "at_budget", "accuracy")
    names += [name, f"{name}_error"] if pair else [name]
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows(rows)


def _frontier(results: Results) -> str:
  form, best = results.form, results.best()
  measured = _curve(
    "best_of_n", [x["kl"] for x in best], [x["reward"] for x in best]
  )
  formula = measured._replace(
    name="best-of-n, at log n - (n-1)/n",
    x=[x["analytic_kl"].value for x in best],
    error=None,
    dashed=True,
    color=0,
  )
  through = []
  for method in METHODS:
    points = results.frontier(method)
    if method != "orpo":  # whose dial is no beta: more of it goes further
      points = points[::-1]
    through.append(
      _curve(method, [p.kl for p in points], [p.reward for p in points])
    )
  axis = "KL to SFT, nats a response"
  return figure(
    [
      Plane(
        "True reward for what it costs in KL", axis, "mean over answers",
        [_theory(), *through, measured], most=6.5,
        range=(_floor(results, -0.5), 4),
      ),
      Plane(
        "Best-of-n: KL as measured and by formula", axis, "mean over answers",
        [_theory(), measured, formula], most=max(formula.x) + 0.1,
      ),
    ],
    f"True reward and KL of every method, {form.seeds} seeds",
  )  # fmt: skip


def _curve(
  method: str, x: Sequence, y: Sequence[Mean], name: str = ""
) -> Curve:
  return Curve(
    name or TITLES[method],
    [v.value if isinstance(v, Mean) else v for v in x],
    [v.value for v in y],
    [v.error for v in y],
    color=list(TITLES).index(method),
  )


def _floor(results: Results, low: float) -> float:
  """Where the axis of rewards ends, so that the start is above it."""
  return min(low, results.start().reward.value - 0.5)


def _theory() -> Curve:
  x, y = tastes.frontier(_TILTS).T
  return Curve(_BEST, list(x), list(y), dashed=True)


def _pairs(results: Results) -> str:
  form = results.form
  sizes = sorted({*form.sizes, form.pairs})
  by = {
    key: [
      _curve(
        method,
        sizes,
        [
          getattr(results.point(method, METHODS[method][0], n), key)
          for n in sizes
        ],
      )
      for method in form.sized
    ]
    for key in ("reward", "accuracy")
  }
  scores = [results.reward_model_accuracy(n) for n in sizes]
  by["accuracy"].append(_curve("start", sizes, scores, "reward model"))
  return figure(
    [
      Plane(
        "True reward", "pairs", "mean over answers", by["reward"], log=True
      ),
      Plane(
        "Accuracy on held-out pairs", "pairs",
        "share in order, by log-ratio or score", by["accuracy"], log=True,
      ),
    ],
    "True reward and accuracy by number of pairs",
  )  # fmt: skip


def _beta(results: Results) -> str:
  form = results.form
  best, floor = tastes.frontier(_TILTS), _floor(results, -1)
  planes = []
  for key, title, unit, column, room in (
    ("reward", "True reward", "mean over answers", 1, (floor, 4)),
    ("kl", "KL to SFT", "nats a response", 0, (-0.2, 10)),
    ("accuracy", "Accuracy on held-out pairs", "share in order", None, (0, 1)),
  ):
    curves = []
    if column is not None:
      curves.append(Curve(_BEST, _TILTS, list(best[:, column]), dashed=True))
    for method in form.dialed:
      if method != "orpo":
        points = results.frontier(method)
        values = [getattr(p, key) for p in points]
        curves.append(_curve(method, [p.dial for p in points], values))
    planes.append(Plane(title, "beta", unit, curves, True, range=room))
  return figure(planes, "True reward, KL and accuracy by beta")


FIGURES = {"frontier": _frontier, "pairs": _pairs, "beta": _beta}
