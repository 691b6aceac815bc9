"""Steps of all variants of a problem: in turns, or one after another."""

import sys
import tempfile

from benchmarks.children import COMPARED, Child, Failed, Where, save_weights
from benchmarks.problem import Problem
from benchmarks.work import needed
from benchmarks.worker import VARIANTS
from dpo_jax import flops


def in_turns(
  problem: Problem, variants: list[str], where: Where, rounds: int
) -> list[dict]:
  """Runs all variants at once, a turn each.

  Returns:
    See `Child.summary`.

  Raises:
    SystemExit: a variant failed, or two variants' losses differ.
  """
  with tempfile.TemporaryDirectory() as path:
    weights = save_weights(problem, variants, path, where)
    try:
      children = [Child(v, problem, weights, where) for v in variants]
      for child in children:
        child.warm()
      for _ in range(rounds):
        for child in children:
          child.turn()
        _compare(children)
    except Failed as e:
      sys.exit(str(e))
    for child in children:
      child.close()
  return [child.summary() for child in children]


def one_by_one(
  problem: Problem,
  variants: list[str],
  where: Where,
  rounds: int,
  *,
  peak_tflops: float = 0.0,
  trace: str = "",
) -> list[dict]:
  """Runs variants one after another, each alone on the device.

  Args:
    problem: sizes.
    variants: by name.
    where: to run.
    rounds: turns that count.
    peak_tflops: of the device; 0: as its kind is known.
    trace: folder for a profile of one step of each JAX variant; "" makes none.

  Returns:
    See `Child.summary`; with "mfu" (None where the peak is not known) and, of
    a variant that failed, "error" alone.
  """
  rows = []
  with tempfile.TemporaryDirectory() as path:
    weights = save_weights(problem, variants, path, where)
    for variant in variants:
      try:
        child = Child(variant, problem, weights, where)
        child.warm()
        for _ in range(rounds):
          child.turn()
        module, _, options = VARIANTS[variant.partition("@")[0]]
        if trace and module == "jax_steps":
          child.traced_step(f"{trace}/{variant}")
        child.close()
      except Failed as e:
        print(e, file=sys.stderr)
        rows.append({"variant": variant, "error": _reason(str(e))})
        continue
      row = child.summary()
      peak = flops.peak(row["device"], problem.dtype, peak_tflops)
      work = needed(problem, reference=not options.get("precomputed"))
      row["mfu"] = peak and work / row["wall_seconds"] / peak
      rows.append(row)
  return rows


def _compare(children) -> None:
  first = [row["loss"] for row in children[0].rows[:COMPARED]]
  for child in children[1:]:
    losses = [row["loss"] for row in child.rows[:COMPARED]]
    if max(abs(a - b) for a, b in zip(first, losses)) > 1e-4:
      sys.exit(
        f"not the same computation: losses {first} of {children[0].variant},"
        f" {losses} of {child.variant}"
      )


def _reason(log: str) -> str:
  """In a few words, why a variant ended."""
  if "RESOURCE_EXHAUSTED" in log or "out of memory" in log.lower():
    return "out of memory"
  return log.strip().splitlines()[-1][:80].replace("|", "/")
