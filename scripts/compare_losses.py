"""Every loss on one task, from one SFT checkpoint, at one budget.

  python scripts/compare_losses.py                    # all, about half an hour
  python scripts/compare_losses.py --losses=dpo,ipo,kto,orpo

Writes the quickstart's corpus, fine-tunes its model, trains each loss on from
there with the settings of configs/compare_losses.py, and judges all by one
measure: the true reward of sampled answers, accuracy and margin of the
log-ratios on held-out pairs, what became of both log-probs, and KL. Prints a
table, and leaves table.md, table.csv and picture.svg in the work directory.
What is trained already is not trained again.
"""

import argparse
import csv
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", default="runs/compare")
  parser.add_argument(
    "--losses", default="", help="names or mixtures, by commas; default: all"
  )
  parser.add_argument(
    "--steps", type=int, default=0, help="of each run, to try it quickly"
  )
  args = parser.parse_args()
  sys.path.insert(0, str(ROOT))
  from configs import compare_losses, quickstart
  from dpo_jax.compare import compare, losses_to_compare
  from dpo_jax.config import from_dict
  from dpo_jax.data.corpus import write_corpus
  from dpo_jax.main import guard
  from dpo_jax.train import train

  workdir = pathlib.Path(args.workdir)

  def run(name, config):
    print(f"\n{name}", flush=True)
    if args.steps:
      config.train.steps = args.steps
    return train(from_dict(config.to_dict()), workdir / name)["model_dir"]

  with guard(goes_on=True):
    write_corpus(workdir / "data")
    names = args.losses.split(",") if args.losses else losses_to_compare()
    sft = quickstart.get_config(f"stage=sft,root={workdir}")
    sft.sample.prompts = 0
    run("sft", sft)
    models = {}
    for name in names:
      config = compare_losses.get_config(f"loss={name},root={workdir}")
      models[name] = run(f"loss {name}", config)
    judged = quickstart.get_config(f"root={workdir}")
    rows = compare(from_dict(judged.to_dict()), models)
    rows[1:] = sorted(rows[1:], key=lambda row: -row.reward)
    _write(workdir, [rows[0]._replace(name="SFT, the start"), *rows[1:]])


def _write(workdir: pathlib.Path, rows: list) -> None:
  from dpo_jax.report import comparison

  columns = [
    ("loss", lambda r: r.name),
    ("true reward", lambda r: f"{r.reward:.2f} ± {r.reward_error:.2f}"),
    ("accuracy", lambda r: f"{r.accuracy:.3f}"),
    ("margin", lambda r: f"{r.margin:.2f}"),
    ("chosen", lambda r: f"{r.chosen:+.2f}"),
    ("rejected", lambda r: f"{r.rejected:+.2f}"),
    ("KL", lambda r: f"{r.kl:.2f}"),
    ("tokens", lambda r: f"{r.tokens:.1f}"),
  ]
  panels = [
    comparison.Panel(
      "True reward", "at most 2; bar: standard error",
      lambda r: r.reward, error=lambda r: r.reward_error,
      base=lambda r: r.reward,
    ),
    comparison.Panel(
      "KL to SFT", "nats a response", lambda r: r.kl, log=True
    ),
    comparison.Panel(
      "Accuracy", "share of held-out pairs in order", lambda r: r.accuracy,
      base=lambda r: r.accuracy,
    ),
    comparison.Panel(
      "Change of log-probs", "nats; chosen blue, rejected orange",
      lambda r: r.chosen, second=lambda r: r.rejected,
      base=lambda r: r.chosen, log=True,
    ),
  ]  # fmt: skip
  table = comparison.markdown(rows, columns)
  (workdir / "table.md").write_text(table + "\n")
  with open(workdir / "table.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(rows[0]._fields)
    writer.writerows(rows)
  picture = workdir / "picture.svg"
  picture.write_text(
    comparison.dot_plot(rows, panels, "Every loss on one task")
  )
  print(f"\n{table}\n\n  picture  {picture}")


if __name__ == "__main__":
  main()
