"""What a run changed: the headline, and notes on what needs a look."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from dpo_jax.report.charts import Curves
from dpo_jax.report.markup import div
from dpo_jax.report.ticks import format_estimate, format_value, is_number

Pair = tuple[float, float]  # Before and after.
Changes = Mapping[str, Pair]

_ACCURACY = "rewards/accuracies"
# Metric, its name, and whether more of it is better.
_HEADLINE = (
  ("objective/scores", "reward of answers", True),
  ("loss", "loss", False),
  (_ACCURACY, "accuracy", True),
  ("rewards/margins", "margin", True),
)
_DISPLACED = (
  "This is likelihood displacement, and common: the objective only asks that"
  " the gap between chosen and rejected widens, and pushing both down is one"
  " way to widen it. The probability goes to other responses, so read the"
  " samples below.</p><p>If it hurts: add an SFT term on the chosen response"
  " (RPO), use a loss that anchors the chosen side (DPO-Positive, APO-zero,"
  " KTO), or move less: a lower learning rate, or a larger beta where the"
  " method has a reference."
)
_OVER_OPTIMISED = (
  "<strong>Accuracy rose but the true reward fell.</strong> The policy"
  " ranks the pairs better and writes worse: a sign of over-optimisation. Try"
  " fewer steps, a larger beta or a lower learning rate."
)

_HACKED = (
  "<strong>The reward rose but the true reward fell.</strong> The policy has"
  " found answers that the reward model likes and nobody else does: a sign of"
  " over-optimisation. Try a larger price of KL (online.kl; of pairs,"
  " loss.beta), fewer steps or a lower learning rate."
)


def changes(curves: Curves) -> tuple[Changes, bool]:
  """Each metric before and after, and whether that is on held-out data.

  Without two evaluations, means of the first and last tenth of the rows.
  """
  held_out = any(
    split == "eval" and len(c) > 1 for (split, _), c in curves.items()
  )
  found = {}
  for (split, key), curve in curves.items():
    y, n = list(curve.values()), 1
    if not held_out:
      y = [v for v in y if math.isfinite(v)]
      n = max(1, len(y) // 10)
    if (split == "eval") == held_out and len(y) > 1:
      pair = fmean(y[:n]), fmean(y[-n:])
      if all(map(math.isfinite, pair)):
        found[key] = pair
  return found, held_out


def headline(changed: Changes, held_out: bool, summary: Mapping) -> str:
  """A sentence or two, and a tile per number."""
  basis = "held-out" if held_out else "training"
  tiles, clauses, lead = [], [], []
  for key, name, more_is_better in _HEADLINE:
    if key in changed:
      title = f"{basis.capitalize()} {name}"
      tiles.append(_moved_tile(title, changed[key], more_is_better))
      clauses.append(f"{name} {_moved(changed[key])}")
  if clauses:
    n = summary.get("eval_examples")
    basis = f"{n:,} {basis} examples" if n and held_out else f"{basis} data"
    told = ", ".join(clauses[:-1]) + " and " * (len(clauses) > 1)
    lead.append(f"On {basis}, {told}{clauses[-1]}.")
  reward = _reward(summary)
  if reward:
    tiles.append(_moved_tile("True reward", reward, True))
    lead.append(f"The true reward of sampled responses {_moved(reward)}.")
  kl = summary.get("kl_to_reference")
  if is_number(kl):
    kl = format_estimate(kl, summary.get("kl_standard_error"))
    unit = "nats per response; 0 where the policy is still the reference"
    tiles.append(_tile("KL to reference", kl, unit))
    lead.append(f"The policy is {kl} nats per response from the reference.")
  if clauses and not held_out:
    lead.append(
      "No held-out evaluation was found: these are means of the first and the"
      " last tenth of the training rows."
    )
  words = " ".join(lead) or "This run holds no metrics to compare yet."
  return f'<p class="lead">{words}</p>{div("tiles", *tiles)}'


def notes(
  changed: Changes, held_out: bool, curves: Curves, summary: Mapping
) -> str:
  """A box for each thing to know before trusting the run."""
  found = []
  before, after = changed.get(_ACCURACY, (0, 0))
  # Batches differ in length, so on training rows only rewards compare.
  kind = "logps" if held_out else "rewards"
  chosen = changed.get(f"{kind}/chosen", (0, 0))
  if after > before and chosen[1] < chosen[0] - 1e-3:
    what = "log-probability" if held_out else "reward"
    moves = [
      f"{side} {_moved(changed[f'{kind}/{side}'])}"
      for side in ("chosen", "rejected")
      if f"{kind}/{side}" in changed
    ]
    found.append(
      f"<strong>The chosen {what} fell although accuracy rose:</strong>"
      f" {', '.join(moves)}. {_DISPLACED}"
    )
  reward = _reward(summary)
  if after > before and reward and reward[1] < reward[0]:
    found.append(_OVER_OPTIMISED)
  before, after = changed.get("objective/scores", (0.0, 0.0))
  if after > before and reward and reward[1] < reward[0]:
    found.append(_HACKED)
  losses = curves.get(("eval", "loss"), {})
  finite = {step: y for step, y in losses.items() if math.isfinite(y)}
  if len(finite) > 2:
    best, last = min(finite, key=finite.__getitem__), max(finite)
    if finite[last] > 1.02 * finite[best] > 0:
      found.append(
        f"<strong>Held-out loss was lowest at step {best:,}</strong>"
        f" ({format_value(finite[best])}) and is {format_value(finite[last])}"
        " at the end: an earlier checkpoint may be the better one."
      )
  losses = curves.get(("train", "loss"), {})
  bad = [f"{step:,}" for step, y in losses.items() if not math.isfinite(y)]
  n = summary.get("skipped_steps", len(bad))
  if n:
    which = f" (step {', '.join(bad[:8])}{' …' * (len(bad) > 8)})" * bool(bad)
    found.append(
      f"<strong>{n:,} step{'s' * (n > 1)} skipped</strong> because the loss or"
      f" a gradient was not finite{which}; the curves have gaps there."
    )
  return "".join(div("note", f"<p>{note}</p>") for note in found)


def _reward(summary: Mapping[str, Any]) -> Pair | None:
  reward = summary.get("true_reward", {})
  pair = reward.get("before"), reward.get("after")
  return pair if all(map(is_number, pair)) else None


def _moved(pair: Pair) -> str:
  before, after = map(format_value, pair)
  if pair[0] == pair[1]:
    return f"stayed at {before}"
  verb = "rose" if pair[1] > pair[0] else "fell"
  return f"{verb} from {before} to {after}"


def _moved_tile(name: str, pair: Pair, more_is_better: bool) -> str:
  before, after = pair
  change = "no change"
  if before != after:
    kind = "better" if (after > before) == more_is_better else "worse"
    moved = f"{'+' * (after > before)}{format_value(after - before)}, {kind}"
    change = f'<span class="{kind}">{moved}</span>'
  values = f"<span>{format_value(before)} →</span> {format_value(after)}"
  return _tile(name, values, change)


def _tile(name: str, value: str, below: str) -> str:
  content = f"<h3>{name}</h3><b>{value}</b><small>{below}</small>"
  return div("card tile", content)
