"""The whole method in minutes, on a CPU: SFT, then DPO, then what changed.

  python scripts/quickstart.py

Writes a preference corpus whose true reward is known, fine-tunes a small
byte-level model on its answers, aligns it by DPO on its pairs, and prints the
true reward of sampled answers before and after beside accuracy, margins and KL.
"""

import argparse
import json
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", default="runs/quickstart")
  parser.add_argument(
    "--steps", type=int, default=0, help="of each stage, to try it quickly"
  )
  args = parser.parse_args()
  begun = time.time()
  sys.path.insert(0, str(ROOT))
  from configs import quickstart
  from dpo_jax.config import from_dict
  from dpo_jax.data.corpus import write_corpus
  from dpo_jax.main import guard
  from dpo_jax.train import train

  workdir = pathlib.Path(args.workdir)
  with guard(goes_on=True):
    for path in write_corpus(workdir / "data").values():
      print(f"wrote {path}")
    for stage in ("sft", "dpo"):
      print(f"\n{stage}: {workdir / stage}")
      config = quickstart.get_config(f"stage={stage},root={workdir}")
      if args.steps:
        config.train.steps = args.steps
      summary = train(from_dict(config.to_dict()), workdir / stage)
    _report(workdir, summary, time.time() - begun)


def _report(workdir: pathlib.Path, dpo: dict, seconds: float) -> None:
  rows = [
    json.loads(line)
    for line in (workdir / "dpo" / "samples.jsonl").read_text().splitlines()
  ]
  print("\nAnswers of the SFT model, and of the same model after DPO:\n")
  for row in rows[:6]:
    question = row["prompt"].removeprefix("Q: ").removesuffix("\nA:")
    print(f"  {question}")
    print(f"    before ({row['reward_before']:+.0f}) {row['before'].strip()}")
    print(f"    after  ({row['reward_after']:+.0f}) {row['after'].strip()}")
  first, last = dpo["initial_eval"], dpo["final_eval"]
  reward = dpo["true_reward"]
  table = [("true reward, at most 2", reward["before"], reward["after"])]
  for name, key in (
    ("held-out accuracy", "rewards/accuracies"),
    ("held-out margin", "rewards/margins"),
    ("held-out loss", "loss"),
  ):
    table.append((name, first[key], last[key]))
  table.append(("KL to SFT, nats a response", 0.0, dpo["kl_to_reference"]))
  print(f"\n{'':28s}{'before':>10s}{'after':>10s}")
  for name, before, after in table:
    print(f"  {name:26s}{before:10.3f}{after:10.3f}")
  print(f"\n  aligned model  {dpo['model_dir']}")
  print(f"  report         {dpo['report']}")
  print(f"  {seconds:.0f} s in all")


if __name__ == "__main__":
  main()
