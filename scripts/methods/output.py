"""The table and the figures of a comparison."""

import csv
import math
import pathlib

from configs.compare_methods import METHODS
from dpo_jax.data import tastes
from dpo_jax.report import comparison
from dpo_jax.report.curves import Curve, Plane, figure
from methods.results import TITLES, Mean, Point, Results, Row

_BEST = "best possible"
# Of the curve that no policy lies above.
_TILTS = [10 ** (k / 20) for k in range(24, -26, -1)]


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
    (method, *_flat(point))
    for method in METHODS
    for point in results.frontier(method)
  ]
  _csv(folder / "points.csv", ("method", *Point._fields), points)
  for name, draw in (
    ("frontier", _frontier),
    ("pairs", _pairs),
    ("beta", _beta),
  ):
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
  form = results.form
  best = results.best()
  of_best = lambda key: Curve(
    f"best-of-n, {'log n - (n-1)/n' if key == 'analytic_kl' else 'measured'}",
    [x[key].value for x in best],
    [x["reward"].value for x in best],
    [x["reward"].error for x in best],
  )
  curves = [_theory()]
  for method in form.dialed:
    curves.append(_through(results, method))
  measured = of_best("kl")._replace(name=TITLES["best_of_n"])
  alone = ("chosen", *(m for m in METHODS if m not in ("chosen", *form.dialed)))
  for method in dict.fromkeys(alone):
    curves.append(_through(results, method))
  title = f"Reward and KL, {form.seeds} seeds"
  return figure(
    [
      Plane(
        "True reward for what it costs in KL", "KL to SFT, nats a response",
        "true reward", [*curves, measured],
      ),
      Plane(
        "Best-of-n: KL as measured and as by formula",
        "KL to SFT, nats a response", "true reward",
        [_theory(), of_best("kl"), of_best("analytic_kl")],
        most=math.ceil(max(x["analytic_kl"].value for x in best)) + 0.01,
      ),
    ],
    title,
  )  # fmt: skip


def _through(results: Results, method: str) -> Curve:
  """By dial, from the largest beta on."""
  points = results.frontier(method)
  if method != "orpo":
    points = points[::-1]
  return Curve(
    TITLES[method],
    [p.kl.value for p in points],
    [p.reward.value for p in points],
    [p.reward.error for p in points],
  )


def _theory() -> Curve:
  x, y = tastes.frontier(_TILTS).T
  return Curve(_BEST, list(x), list(y), dashed=True)


def _pairs(results: Results) -> str:
  form = results.form
  sizes = sorted({*form.sizes, form.pairs})
  by_reward, by_accuracy = [], []
  for method in form.sized:
    points = [results.point(method, METHODS[method][0], n) for n in sizes]
    of = lambda key, points=points, method=method: Curve(
      TITLES[method],
      sizes,
      [getattr(p, key).value for p in points],
      [getattr(p, key).error for p in points],
    )
    by_reward.append(of("reward"))
    by_accuracy.append(of("accuracy"))
  scores = [results.reward_model_accuracy(n) for n in sizes]
  by_accuracy.append(
    Curve(
      "reward model",
      sizes,
      [x.value for x in scores],
      [x.error for x in scores],
    )
  )
  return figure(
    [
      Plane("True reward", "pairs", "mean over answers", by_reward, log=True),
      Plane(
        "Accuracy on held-out pairs", "pairs",
        "share in order, by log-ratio or score", by_accuracy, log=True,
      ),
    ],
    "By number of pairs",
  )  # fmt: skip


def _beta(results: Results) -> str:
  form = results.form
  methods = [m for m in form.dialed if m != "orpo"]
  tilts = [t for t in _TILTS if min(form.dials) <= t <= max(form.dials) * 1.001]
  best = tastes.frontier(tilts)
  planes = []
  for key, title, unit, column in (
    ("reward", "True reward", "mean over answers", 1),
    ("kl", "KL to SFT", "nats a response", 0),
    ("accuracy", "Accuracy on held-out pairs", "share in order", None),
  ):
    curves = []
    if column is not None:
      curves.append(Curve(_BEST, tilts, list(best[:, column]), dashed=True))
    for method in methods:
      points = results.frontier(method)
      curves.append(
        Curve(
          TITLES[method],
          [p.dial for p in points],
          [getattr(p, key).value for p in points],
          [getattr(p, key).error for p in points],
        )
      )
    planes.append(Plane(title, "beta", unit, curves, log=True))
  return figure(planes, "By beta")
