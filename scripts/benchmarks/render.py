"""What a benchmark reports beside the numbers, and how."""

import datetime
import importlib.metadata
import importlib.util
import os
import pathlib
import platform

from benchmarks.problem import Problem, gflop

PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "trl")


def machine(cores, threads) -> dict:
  """What the numbers were measured on."""
  cpu = platform.processor()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    names = [x for x in info.read_text().splitlines() if "model name" in x]
    cpu = names[0].partition(":")[2].strip() if names else cpu
  found = {p: importlib.util.find_spec(p) for p in PACKAGES}
  return {
    "date": datetime.date.today().isoformat(),
    "cpu": cpu,
    "cores": os.cpu_count(),
    "used_cores": sorted(cores),
    "threads": threads,
    "python": platform.python_version(),
    **{p: importlib.metadata.version(p) for p in PACKAGES if found[p]},
  }


def table(problem: Problem, rows: list[dict]) -> str:
  """A markdown table; ratios are against the first row."""
  lines = [
    problem.name,
    "",
    "| variant | CPU s a step (range) | pairs/s | tokens/s | ratio |"
    " XLA temp MB | peak RSS MB | losses |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    temp = f"{row['temp_mb']:.0f}" if row["temp_mb"] else "-"
    losses = " ".join(f"{x:.6f}" for x in row["losses"])
    lines.append(
      f"| {row['variant']} | {row['cpu_seconds']:.2f}"
      f" ({row['cpu_seconds_lowest']:.2f}-{row['cpu_seconds_highest']:.2f})"
      f" | {row['pairs_per_cpu_second']:.2f}"
      f" | {row['tokens_per_cpu_second']:.0f}"
      f" | {row['cpu_seconds'] / rows[0]['cpu_seconds']:.2f}x"
      f" | {temp} | {row['peak_rss_mb']:.0f} | {losses} |"
    )
  lines += [
    "",
    "Matrix products by the cost model:"
    f" {gflop(problem, True):.0f} GFLOP shared,"
    f" {gflop(problem, False):.0f} concatenated.",
  ]
  return "\n".join(lines)
