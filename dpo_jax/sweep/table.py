"""What came out of each run, as one table."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from dpo_jax.config import flatten
from dpo_jax.report.comparison import markdown
from dpo_jax.report.ticks import format_value, is_number
from dpo_jax.sweep.options import Sweep
from dpo_jax.sweep.status import Place

# Of a summary: column -> key, in the order of the table.
RESULTS = {
  "steps": "steps",
  "loss": "final_eval.loss",
  "accuracy": "final_eval.rewards/accuracies",
  "margin": "final_eval.rewards/margins",
  "chosen": "final_eval.logps/chosen",
  "rejected": "final_eval.logps/rejected",
  "reward": "true_reward.after",
  "reward_before": "true_reward.before",
  "kl": "kl_to_reference",
  "skipped": "skipped_steps",
  "pairs_per_second": "throughput.pairs_per_second",
  "seconds": "wall_seconds",
}

Row = dict[str, Any]


def rows_of(sweep: Sweep) -> list[Row]:
  """A row a run, in the order of the sweep, of the same columns: its id, what
  the sweep sets, its state and, once done, its results (None before)."""
  keys = list(dict.fromkeys(k for run in sweep.runs for k in run.overrides))
  rows = []
  for run in sweep.runs:
    place = sweep.place(run)
    results = _results(place)
    every = flatten(run.config.to_dict())
    rows.append(
      {"run": run.id}
      | {key: every.get(key) for key in keys}
      | {"state": place.state().value}
      | {name: results.get(key) for name, key in RESULTS.items()}
    )
  kept = [k for k in RESULTS if any(row[k] is not None for row in rows)]
  drop = RESULTS.keys() - kept
  return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def to_csv(rows: Sequence[Row]) -> str:
  """Numbers in full; what is not known is empty."""
  file = io.StringIO()
  writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
  """Numbers rounded as a person would; `run` last, for its length."""
  names = [name for name in rows[0] if name != "run"] + ["run"]
  columns = [(n, lambda row, n=n: _cell(show(n, row[n]))) for n in names]
  return markdown(rows, columns) + "\n"


def show(name: str, value: Any) -> str:
  """A value in few characters; settings as they are, results rounded."""
  if value is None:
    return ""
  if name in RESULTS and is_number(value) and not isinstance(value, int):
    return format_value(value)
  return str(value)


def _cell(text: str) -> str:
  return text.replace("|", "\\|").replace("\n", " ")


def _results(place: Place) -> dict[str, Any]:
  """Of the summary, flat; empty where there is none that can be read."""
  try:
    summary = json.loads(place.summary.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return flatten(summary) if isinstance(summary, dict) else {}
