"""Whether a reward model's probabilities are those that preferences have."""

from typing import Any

import numpy as np

from dpo_jax.metrics import accuracy_interval

BINS = 10


def calibration(margins: np.ndarray, bins: int = BINS) -> dict[str, Any]:
  """Reliability of the Bradley-Terry probabilities sigmoid(margin).

  Which response of a pair was chosen is what is to be predicted, so each pair
  is seen from the side that the model prefers: it says sigmoid(|margin|), from
  0.5 on, and is right where the margin is above 0 (a tie: half). The expected
  calibration error is that of Guo et al. 2017 (1706.04599), eq. 3 and 5: the
  distance of what was said from what was seen, in bins of equal width, weighed
  by pairs.

  Args:
    margins: f[N], score of the chosen response minus that of the rejected;
      what is not finite is left out.
    bins: from 0.5 to 1.

  Returns:
    {"pairs", "error", "bins"}: the error None without a pair; of each bin that
    has any {"from", "to", "pairs", "predicted", "observed", "interval"}, means
    and the 95 % interval of what was seen.
  """
  margins = np.asarray(margins, np.float64)
  margins = margins[np.isfinite(margins)]
  said = 1 / (1 + np.exp(-np.abs(margins)))
  right = 0.5 * (1 + np.sign(margins))
  edges = np.linspace(0.5, 1.0, bins + 1)
  at = np.minimum((said - 0.5) * 2 * bins, bins - 1).astype(int)
  table, error = [], 0.0
  for i in range(bins):
    mine = at == i
    n = int(mine.sum())
    if not n:
      continue
    predicted, observed = float(said[mine].mean()), float(right[mine].mean())
    error += n * abs(predicted - observed)
    table.append({
      "from": float(edges[i]),
      "to": float(edges[i + 1]),
      "pairs": n,
      "predicted": predicted,
      "observed": observed,
      "interval": accuracy_interval(observed, n),
    })  # fmt: skip
  n = len(margins)
  return {"pairs": n, "error": error / n if n else None, "bins": table}


def render(found: dict[str, Any]) -> list[str]:
  """Lines to read: the error, and a row a bin."""
  if not found["pairs"]:
    return []
  lines = [
    f"calibration error {found['error']:.4f}",
    "  says          on average  seen    [95 % interval]     pairs",
  ]
  for row in found["bins"]:
    low, high = row["interval"]
    lines.append(
      f"  {row['from']:.2f} to {row['to']:.2f}  {row['predicted']:10.4f}  "
      f"{row['observed']:.4f}  [{low:.4f}, {high:.4f}]  {row['pairs']:6d}"
    )
  return lines
