"""Measures one DPO training step, this package's against others'.

  python scripts/benchmark.py --prompt=512 --response=128 --rounds=5

Every variant is a child process pinned to one core, with the same weights and
token ids. They take turns, step by step, so that a noisy machine is noisy for
all; medians of CPU seconds are reported, and the first losses are compared, so
that nobody measures two different things. docs/benchmarks.md has the results
and says what each variant is.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

SCRIPTS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]

from benchmarks.problem import Problem  # noqa: E402
from benchmarks.render import machine, table  # noqa: E402
from benchmarks.worker import VARIANTS  # noqa: E402

# It must stand before the backend starts. Without it XLA:CPU keeps far more
# temporaries alive, in all JAX variants.
XLA_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
COMPARED = 3  # losses


class Child:
  """One variant in its process; `step()` takes one training step there."""

  def __init__(self, variant, problem, path, cores, threads):
    self.variant = variant
    self.rows: list[dict] = []
    name, _, checkout = variant.partition("@")
    env = dict(os.environ)
    env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    env |= {
      "XLA_FLAGS": XLA_FLAGS,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{SCRIPTS}{os.pathsep}{checkout or SCRIPTS.parent}",
      "TOKENIZERS_PARALLELISM": "false",
      "HF_HUB_OFFLINE": "1",
    }
    if threads == 1:
      env["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    self._process = subprocess.Popen(
      [
        sys.executable, "-m", "benchmarks.worker", name,
        json.dumps(dataclasses.asdict(problem)), path,
      ],
      env=env, text=True, bufsize=1, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=self._log, cwd="/",
      preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    self.ready = self._answer()

  def step(self) -> dict:
    self.rows.append(self._ask("step"))
    return self.rows[-1]

  def forget_peak(self) -> None:
    self._ask("trim")

  def close(self) -> None:
    self._process.communicate("end\n")

  def _ask(self, command):
    self._process.stdin.write(command + "\n")
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      sys.exit(f"{self.variant} ended:\n{self._log.read()[-4000:]}")
    return json.loads(line)


def measure(problem, variants, *, cores, threads, rounds, steps) -> list[dict]:
  """Runs all variants in turns.

  Returns:
    For each its CPU and wall seconds a step (medians), peak memory in MB and
    first losses.

  Raises:
    SystemExit: a variant failed, or two variants' losses differ.
  """
  with tempfile.TemporaryDirectory() as path:
    weights = f"{path}/model"
    subprocess.run(
      [
        sys.executable, "-c",
        "import sys, json; from benchmarks.problem import Problem;"
        "Problem(**json.loads(sys.argv[1])).save_weights(sys.argv[2])",
        json.dumps(dataclasses.asdict(problem)), weights,
      ],
      check=True,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2])},
    )  # fmt: skip
    children = [Child(v, problem, weights, cores, threads) for v in variants]
    for child in children:  # warm-up, and the losses to compare
      for _ in range(COMPARED):
        child.step()
      child.forget_peak()
    _compare(children)
    for _ in range(rounds):
      for child in children:
        for _ in range(steps):
          child.step()
    for child in children:
      child.close()
  return [_summary(child, problem) for child in children]


def _compare(children) -> None:
  first = [row["loss"] for row in children[0].rows]
  for child in children[1:]:
    losses = [row["loss"] for row in child.rows]
    if max(abs(a - b) for a, b in zip(first, losses)) > 1e-4:
      sys.exit(
        f"not the same computation: losses {first} of {children[0].variant},"
        f" {losses} of {child.variant}"
      )


def _summary(child, problem) -> dict:
  timed = child.rows[COMPARED:]
  cpu = statistics.median(row["cpu"] for row in timed)
  temp = child.ready.get("temp_bytes")
  return {
    "variant": child.variant,
    "cpu_seconds": cpu,
    "cpu_seconds_lowest": min(row["cpu"] for row in timed),
    "cpu_seconds_highest": max(row["cpu"] for row in timed),
    "wall_seconds": statistics.median(row["wall"] for row in timed),
    "pairs_per_cpu_second": problem.pairs / cpu,
    "tokens_per_cpu_second": problem.tokens / cpu,
    "temp_mb": temp and temp / 1e6,
    "peak_rss_mb": timed[-1]["peak"],
    "steps": len(timed),
    "losses": [row["loss"] for row in child.rows[:COMPARED]],
  }


def main() -> None:
  args = _arguments()
  sizes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Problem)}
  problem = Problem(**sizes)
  cores = {int(c) for c in args.cores.split(",")}
  variants = args.variants.split(",")
  for variant in variants:
    if variant.partition("@")[0] not in VARIANTS:
      sys.exit(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
  if importlib.util.find_spec("trl") is None:
    left = [v for v in variants if not v.startswith("trl")]
    print("trl is not installed: its rows are left out", file=sys.stderr)
    variants = left
  rows = measure(
    problem, variants, cores=cores, threads=args.threads, rounds=args.rounds,
    steps=args.steps,
  )  # fmt: skip
  print(table(problem, rows))
  result = {
    "machine": machine(cores, args.threads),
    "problem": dataclasses.asdict(problem),
    "rows": rows,
  }
  if args.json:
    with open(args.json, "a") as file:
      print(json.dumps(result), file=file)
  else:
    print(json.dumps(result["machine"]))


def _arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for field in dataclasses.fields(Problem):
    kind = type(field.default)
    flag = "--" + field.name.replace("_", "-")
    parser.add_argument(flag, type=kind, default=field.default)
  parser.add_argument(
    "--variants", default="ours,concat,trl",
    help=f"of {', '.join(VARIANTS)}; NAME@FOLDER takes dpo_jax from another"
    " checkout; ratios are against the first",
  )  # fmt: skip
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=1, help="a turn")
  parser.add_argument("--cores", default="0", help="to pin to, e.g. 0,1")
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument("--json", help="file to append the result to")
  return parser.parse_args()


if __name__ == "__main__":
  main()
