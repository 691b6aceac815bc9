"""Three stages with rollouts, or one supervised loss: both, on one task.

  python scripts/compare_methods.py --quick  # a minute or two: all is made
  python scripts/compare_methods.py          # two seeds, under an hour
  python scripts/compare_methods.py --full   # five seeds, all sizes and betas

From one SFT model, at one budget of responses with a gradient: SFT on the
chosen answers, best-of-n, DPO, IPO, KTO, ORPO, and a reward model with PPO,
GRPO or online DPO behind it; all judged by the true reward of the generated
task of dpo_jax/data/tastes.py, which PPO is also given itself, as where rewards
can be computed. Prints a table; leaves table.md, table.csv, points.csv,
frontier.svg, pairs.svg and beta.svg in the work directory. What is trained
already is not trained again. docs/methods.md has what came out.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys

SCRIPTS = pathlib.Path(__file__).resolve().parent


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", default="")
  form = parser.add_mutually_exclusive_group()
  form.add_argument("--quick", action="store_true", help="to see it work")
  form.add_argument("--full", action="store_true", help="hours of 2 cores")
  parser.add_argument(
    "--seeds", type=int, default=0, help="another number of seeds"
  )
  parser.add_argument(
    "--figures", default="", help="also there, as methods_frontier.svg, ..."
  )
  args = parser.parse_args()
  sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
  # Most of the time of such small models goes into compiling them.
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1"
  import jax
  from methods import forms, output, results, runs

  from dpo_jax.main import guard

  name = "quick" if args.quick else "full" if args.full else ""
  form = {"quick": forms.QUICK, "full": forms.FULL, "": forms.Form()}[name]
  if args.quick:
    jax.config.update("jax_disable_most_optimizations", True)
  if args.seeds:
    form = dataclasses.replace(form, seeds=args.seeds)
  folder = pathlib.Path(args.workdir or f"runs/methods{name and f'_{name}'}")
  with guard(goes_on=True):
    work = runs.Runs(folder, form)
    work.sft()
    for job in form.jobs():
      work.train(job)
    table = output.write(results.Results(work), folder)
    for name in output.FIGURES if args.figures else ():
      copy = pathlib.Path(args.figures) / f"methods_{name}.svg"
      shutil.copyfile(folder / f"{name}.svg", copy)
    print(f"\n{table}\n\n  figures  {folder}/frontier.svg, pairs.svg, beta.svg")


if __name__ == "__main__":
  main()
