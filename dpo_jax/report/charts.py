"""Which metrics become which charts."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dpo_jax.report.markup import details, div, text
from dpo_jax.report.svg import Series, line_chart
from dpo_jax.report.ticks import smooth

# (split, metric) -> {step: value}, by step.
Curves = dict[tuple[str, str], dict[int, float]]

_LN2 = math.log(2)


class Plot(NamedTuple):
  title: str
  unit: str
  keys: tuple[str, ...]
  sub: str = ""
  guides: Mapping[float, str] = {}


_LOSS = Plot("Loss", "loss", ("loss",), "Lower is better.")
_ACCURACY = Plot(
  "Accuracy",
  "fraction of pairs",
  ("rewards/accuracies",),
  "Share of pairs whose chosen response has the higher reward; a tie counts"
  " half.",
  {0.0: "", 0.5: "chance", 1.0: ""},
)
_MARGIN = Plot(
  "Reward margin",
  "reward (β × nats)",
  ("rewards/margins",),
  "Chosen minus rejected reward: how far apart the policy puts them.",
  {0.0: ""},
)
_REWARDS = Plot(
  "Rewards",
  "reward (β × nats)",
  ("rewards/chosen", "rewards/rejected"),
  "β × log-ratio to the reference. Below 0: less likely than there.",
  {0.0: ""},
)
_LOGPS = Plot(
  "Log-probabilities",
  "nats per response",
  ("logps/chosen", "logps/rejected"),
  "Of whole responses. The margin can widen while both fall.",
)
_ANSWERED = Plot(
  "Reward of answers",
  "reward",
  ("objective/scores",),
  "Of what the policy itself answers; held-out prompts have one answer each.",
)
_MOVED = Plot(
  "KL to the reference",
  "nats per response",
  ("objective/kl",),
  "The price of the reward, estimated from the same answers.",
  {0.0: ""},
)
_SMALL = (
  Plot("Gradient norm", "global L2 norm", ("grad_norm",)),
  Plot("Learning rate", "per step", ("learning_rate",)),
  Plot("KL estimate", "nats per response", ("kl",)),
  Plot("NLL of the chosen response", "nats", ("nll_loss",)),
  Plot("Throughput", "examples per second", ("pairs_per_second",)),
)
# In the table of the run, whose machine they tell of, and in no chart.
_TABLED = {
  "tokens_per_second", "mfu", "data_wait", "goodput", "peak_memory_bytes",
  "rollout_seconds", "update_seconds",
}  # fmt: skip


def curves_of(rows: Iterable[Mapping[str, Any]]) -> Curves:
  """The curves of metric rows; a later row of the same step wins."""
  curves: Curves = {}
  for row in sorted(rows, key=lambda row: row["step"]):
    for key in row.keys() - {"step", "split"}:
      curve = curves.setdefault((row["split"], key), {})
      curve[row["step"]] = row[key]
  return curves


def charts(curves: Curves, method: str) -> str:
  """All charts of a run, a card each."""
  loss, rewards = _LOSS, _REWARDS
  first = next(iter(curves.get(("eval", "loss"), {}).values()), 0.0)
  if abs(first - _LN2) < 1e-3:
    loss = loss._replace(guides={_LN2: "ln 2: equal to the reference"})
  margin = _MARGIN
  if method == "reward":
    loss = loss._replace(guides={_LN2: "ln 2: all scores equal"})
    margin = margin._replace(
      unit="score", sub="Chosen minus rejected score, in nats of log-odds."
    )
    rewards = rewards._replace(
      unit="score", sub="Known up to a constant for each prompt."
    )
  if method == "orpo":
    sub = "β × log-probability: this method has no reference."
    rewards = rewards._replace(sub=sub, guides={})
  small = _SMALL
  if method == "grpo":  # of this loss it is that of tokens
    small = [
      plot._replace(unit="nats per token") if plot.keys == ("kl",) else plot
      for plot in small
    ]
  groups = (
    ("main", (400, 270), (_ANSWERED, _MOVED, loss, _ACCURACY, margin)),
    ("charts", (560, 290), (rewards, _LOGPS)),
    ("small", (360, 200), small),
  )
  seen = {key for *_, plots in groups for plot in plots for key in plot.keys}
  others = sorted({key for _, key in curves} - seen - _TABLED)
  more = _grid(curves, "small", (360, 200), [Plot(k, "", (k,)) for k in others])
  return (
    '<h2>Curves</h2><p class="sub">Strong lines are training, smoothed where'
    " faint ones show each logged value; dots are held-out evaluations.</p>"
    + "".join(_grid(curves, *group) for group in groups)
    + (details("Other metrics", more) if others else "")
  )


def _grid(
  curves: Curves, name: str, size: tuple[int, int], plots: Iterable[Plot]
) -> str:
  return div(name, *(_card(curves, plot, size) for plot in plots))


def _card(curves: Curves, plot: Plot, size: tuple[int, int]) -> str:
  """A chart with its title and legend; "" where there is nothing to show."""
  sides = [k.split("/")[1] if len(plot.keys) > 1 else "" for k in plot.keys]
  series = [
    s for key, side in zip(plot.keys, sides) for s in _series(curves, key, side)
  ]
  svg = line_chart(series, plot.title, plot.unit, plot.guides, size)
  if not svg:
    return ""
  legend = [
    f'<span style="color:var(--{s.color})"><i class="{s.style}"></i>'
    f"<small>{s.name}</small></span>"
    for s in series
    if s.style != "thin"
  ]
  return div(
    "card",
    f"<h3>{text(plot.title)}</h3>",
    f'<p class="sub">{plot.sub}</p>' if plot.sub else "",
    div("key", *legend) if len(legend) > 1 else "",
    svg,
  )


def _series(curves: Curves, key: str, side: str) -> list[Series]:
  """A metric in both splits; `side` is empty where it has its own plot."""
  out = []
  of = f"{side}, " if side else ""
  train, held_out = (curves.get((s, key), {}) for s in ("train", "eval"))
  x, y, name = list(train), list(train.values()), f"{of}train"
  # The learning rate is no noisy measurement.
  window = 1 if key == "learning_rate" else len(x) // 20 * 2 + 1
  if window > 1:
    out.append(Series(f"{name}, each row", x, y, side or "train", "thin"))
    y, name = smooth(y, window), f"{name}, mean of {window}"
  if x:
    label = side or ("train" if held_out else "")
    out.append(Series(name, x, y, side or "train", "line", label))
  if held_out:
    label = (None if x else side) if side else "eval"
    x, y = list(held_out), list(held_out.values())
    out.append(Series(f"{of}eval", x, y, side or "eval", "dots", label))
  return out
