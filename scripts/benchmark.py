"""Measures one DPO training step, this package's against others'.

  python scripts/benchmark.py --prompt=512 --response=128 --rounds=5
  python scripts/benchmark.py --lengths=hh,tldr-like --pairs=8 --batches=3
  python scripts/benchmark.py --device=gpu

Every variant is a child process with the same weights and token ids. On the CPU
it is pinned to one core, and variants take turns, step by step, so that a noisy
machine is noisy for all; medians of CPU seconds are reported, and the first
losses are compared, so that nobody measures two different things.

With --device it is the set of benchmarks/device_set.py, in bfloat16, one
variant after another: wall time, the share of the device's peak, memory.
--device=cpu --models=tiny tries that out.

Tables are printed, and everything is written to a JSON file. docs/benchmarks.md
has the results and says what each variant is.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys

SCRIPTS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which measures nothing

from benchmarks import device_set, lengths, render  # noqa: E402
from benchmarks.children import Where  # noqa: E402
from benchmarks.measure import in_turns, one_by_one  # noqa: E402
from benchmarks.problem import Problem  # noqa: E402
from benchmarks.worker import NEEDS, VARIANTS  # noqa: E402

# Of a problem, what arguments set.
SIZES = {f.name: f for f in dataclasses.fields(Problem)}
del SIZES["lengths"], SIZES["distribution"]


def main() -> None:
  args = _arguments()
  given = {k: v for k, v in vars(args).items() if k in SIZES}
  on_device = bool(args.device)
  pythons = dict(entry.partition("=")[::2] for entry in args.python)
  where = Where(args.device, pythons=pythons)
  if not on_device:
    cores = frozenset(int(c) for c in args.cores.split(","))
    where = Where("cpu", cores, args.threads, pythons)
  variants = _installed(
    args.variants or (device_set.DEFAULT_VARIANTS if on_device else
                      "ours,concat,trl"),
    where,
  )  # fmt: skip
  names = _known(
    "--lengths",
    args.lengths or (device_set.DEFAULT_LENGTHS if on_device else "fixed"),
    lengths.NAMES,
  )
  models = _known("--models", args.models, device_set.MODELS)
  results = render.Results(args.json)
  for model in models if on_device else [""]:
    for name in names:
      of_set = device_set.settings(model, name) if on_device else {}
      problem = _problem(of_set | given, name, args)
      if on_device:
        rows = one_by_one(
          problem, variants, where, args.rounds,
          peak_tflops=args.peak_tflops, trace=args.trace,
        )  # fmt: skip
        print(f"{model}: {render.device_table(problem, rows)}\n", flush=True)
        doubt = device_set.comparable(problem, rows)
      else:
        rows, doubt = in_turns(problem, variants, where, args.rounds), ""
        print(render.cpu_table(problem, rows) + "\n", flush=True)
      results.add(
        problem, rows, model=model, device=where.device, threads=where.threads,
        cores=sorted(where.cores or []), doubt=doubt,
      )  # fmt: skip
      if doubt:
        print(f"{doubt}\n", file=sys.stderr)


def _problem(fields: dict, name: str, args) -> Problem:
  sizes = Problem(**fields)
  found = lengths.draw(
    name, sizes.pairs * sizes.batches, longest=args.longest, seed=sizes.seed,
    data=args.data,
  )  # fmt: skip
  return Problem(**fields, distribution=name, lengths=found)


def _installed(names: str, where: Where) -> list[str]:
  """The variants whose packages are there; the others are named."""
  variants = _known("--variants", names, VARIANTS)
  for module, package in NEEDS.items():
    of_it = [v for v in variants if VARIANTS[v.partition("@")[0]][0] == module]
    elsewhere = [v for v in of_it if v.partition("@")[0] in where.pythons]
    missing = importlib.util.find_spec(package) is None
    if missing and (left := [v for v in of_it if v not in elsewhere]):
      print(
        f"{package} is not installed: without {', '.join(left)}",
        file=sys.stderr,
      )
      variants = [v for v in variants if v not in left]
  if not variants:
    sys.exit("--variants: none of these can be run here")
  return variants


def _known(flag: str, names: str, known) -> list[str]:
  """A list with commas of names that are known."""
  found = names.split(",")
  for name in found:
    if name.partition("@")[0] not in known:
      sys.exit(f"{flag}: {name!r} should be of {', '.join(known)}")
  return found


def _arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for field in SIZES.values():
    kind = type(field.default)
    parser.add_argument(
      "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
      type=kind if kind is not bool else lambda text: bool(int(text)),
      help=f"default {field.default}, or that of the set",
    )  # fmt: skip
  parser.add_argument(
    "--variants", default="",
    help=f"of {', '.join(VARIANTS)}; NAME@FOLDER takes dpo_jax from another"
    " checkout; ratios are against the first",
  )  # fmt: skip
  parser.add_argument(
    "--lengths", default="", help=f"of {', '.join(lengths.NAMES)}"
  )
  parser.add_argument(
    "--longest", type=int, default=1024, help="prompt with a response"
  )
  parser.add_argument("--data", default="", help="pairs of --lengths=hh")
  parser.add_argument("--rounds", type=int, default=5, help="turns that count")
  parser.add_argument("--cores", default="0", help="to pin to, e.g. 0,1")
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument(
    "--python", action="append", default=[], metavar="VARIANT=PROGRAM",
    help="runs a variant in another environment",
  )  # fmt: skip
  parser.add_argument(
    "--device", default="", choices=("", "cpu", "gpu", "tpu"),
    help="measures the set for accelerators",
  )  # fmt: skip
  parser.add_argument(
    "--models", default=device_set.DEFAULT_MODELS,
    help=f"of the set: {', '.join(device_set.MODELS)}",
  )  # fmt: skip
  parser.add_argument(
    "--peak-tflops", type=float, default=0.0,
    help="of the device, for MFU; 0: as its kind is known",
  )  # fmt: skip
  parser.add_argument("--trace", default="", help="folder for profiles")
  parser.add_argument(
    "--json", default="benchmark.json", help="file to add the results to"
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
