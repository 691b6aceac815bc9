"""What a benchmark reports beside the numbers, and how."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys

from benchmarks.problem import Problem
from benchmarks.work import concatenated, needed

PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "trl")


def machine() -> dict:
  """What the numbers are measured on."""
  cpu = platform.processor()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    facts = [x.partition(":") for x in info.read_text().splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in reversed(facts)}
    family = " ".join(
      f"{k} {facts[k]}" for k in ("cpu family", "model") if k in facts
    )
    cpu = f"{facts.get('model name', cpu)} ({family})"
  found = {p: importlib.util.find_spec(p) for p in PACKAGES}
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return {
    "cpu": cpu,
    "cores": os.cpu_count(),
    "memory_gb": round(memory / 1e9),
    "python": platform.python_version(),
    **{p: importlib.metadata.version(p) for p in PACKAGES if found[p]},
  }


class Results:
  """A JSON file: one description of the machine, and all that ran there."""

  def __init__(self, path: str):
    """Raises SystemExit for a file of another machine, or none of these."""
    self._path = pathlib.Path(path)
    self._content = {"machine": machine(), "runs": []}
    if self._path.exists():
      try:
        content = json.loads(self._path.read_text())
        there, runs = content["machine"], content["runs"]
      except (ValueError, KeyError, TypeError):
        sys.exit(f"--json: {path} is no file of results; name another")
      if there != self._content["machine"]:
        sys.exit(
          f"--json: {path} was measured on {there}, this is"
          f" {self._content['machine']}; name another file"
        )
      self._content["runs"] = runs

  def add(self, problem: Problem, rows: list[dict], **how) -> None:
    fields = vars(problem) | {"name": problem.name}
    run = {"date": datetime.date.today().isoformat(), **how}
    run |= {"problem": fields, "rows": rows}
    self._content["runs"].append(run)
    part = self._path.with_name(self._path.name + ".part")
    part.write_text(json.dumps(self._content, indent=1) + "\n")
    part.replace(self._path)


def cpu_table(problem: Problem, rows: list[dict]) -> str:
  """A markdown table of CPU seconds; ratios are against the first row."""
  lines = [
    problem.name,
    "",
    "| variant | CPU s a step (range) | pairs/s | tokens/s | ratio |"
    " XLA temp MB | peak RSS MB | losses |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    lines.append(
      f"| {row['variant']} | {row['cpu_seconds']:.2f}"
      f" ({row['cpu_seconds_lowest']:.2f}-{row['cpu_seconds_highest']:.2f})"
      f" | {row['pairs_per_cpu_second']:.2f}"
      f" | {row['tokens_per_cpu_second']:.0f}"
      f" | {row['cpu_seconds'] / rows[0]['cpu_seconds']:.2f}x"
      f" | {_or_none(row['temp_mb'])} | {row['peak_rss_mb']:.0f}"
      f" | {_losses(row)} |"
    )
  lines += [
    "",
    "Matrix products by the cost model:"
    f" {needed(problem) / 1e9:.3g} GFLOP shared,"
    f" {concatenated(problem) / 1e9:.3g} concatenated.",
  ]
  return "\n".join(lines)


def device_table(problem: Problem, rows: list[dict]) -> str:
  """Likewise of wall time, the share of the peak, and device memory."""
  lines = [
    problem.name,
    "",
    "| variant | ms a step (range) | pairs/s | tokens/s | ratio | MFU |"
    " device peak MB | planned by XLA MB | losses |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  whole = [row for row in rows if "error" not in row]
  for row in rows:
    if "error" in row:
      lines.append(f"| {row['variant']} | {row['error']} |" + " - |" * 7)
      continue
    low, high = row["wall_seconds_lowest"], row["wall_seconds_highest"]
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    lines.append(
      f"| {row['variant']} | {1e3 * row['wall_seconds']:.1f}"
      f" ({1e3 * low:.1f}-{1e3 * high:.1f})"
      f" | {row['pairs_per_wall_second']:.2f}"
      f" | {row['tokens_per_wall_second']:.0f}"
      f" | {row['wall_seconds'] / whole[0]['wall_seconds']:.2f}x | {mfu}"
      f" | {_or_none(row['device_peak_mb'])} | {_or_none(row['planned_mb'])}"
      f" | {_losses(row)} |"
    )
  for row in whole:
    if row["trace"]:
      lines += ["", f"Milliseconds of one step of {row['variant']}:", ""]
      lines += [
        f"- {title}: " + ", ".join(f"{k} {v:.2f}" for k, v in part.items())
        for title, part in row["trace"].items()
      ]
  return "\n".join(lines)


def _or_none(n: float | None) -> str:
  return "-" if n is None else f"{n:.0f}"


def _losses(row: dict) -> str:
  return " ".join(f"{x:.6f}" for x in row["losses"])
