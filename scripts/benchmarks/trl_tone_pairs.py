"""TRL's DPOTrainer over tone_pairs with the tiny stories260k model.

  python scripts/benchmarks/trl_tone_pairs.py --model=DIR --pairs=FILE

Prints one JSON object: held-out loss and reward accuracy before and after, and
wall and CPU seconds. docs/benchmarks.md has the same run by this package.
"""

import argparse
import gzip
import json
import os
import resource
import tempfile
import time


def main() -> None:
  args = _arguments()
  os.environ["HF_HUB_OFFLINE"] = "1"
  begun = time.perf_counter()
  import datasets
  import torch
  import transformers
  from trl import DPOConfig, DPOTrainer

  torch.set_num_threads(args.threads)
  with gzip.open(args.pairs, "rt") as file:
    rows = [json.loads(line) for line in file]
  rows = [r for r in rows if r["chosen"] != r["rejected"]]
  held_out, train = rows[: args.held_out], rows[args.held_out :]

  def load():
    return transformers.AutoModelForCausalLM.from_pretrained(
      args.model, dtype=torch.float32
    )

  with tempfile.TemporaryDirectory() as folder:
    trainer = DPOTrainer(
      model=load(),
      ref_model=load(),
      args=DPOConfig(
        output_dir=folder,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        beta=args.beta,
        bf16=False,
        gradient_checkpointing=args.checkpointing,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=args.seed,
      ),
      train_dataset=datasets.Dataset.from_list(train),
      eval_dataset=datasets.Dataset.from_list(held_out),
      processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
    )
    before = trainer.evaluate()
    started = time.perf_counter()
    steps = trainer.train().global_step
    trained = time.perf_counter()
    after = trainer.evaluate()
  usage = resource.getrusage(resource.RUSAGE_SELF)
  keys = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
  print(
    json.dumps(
      {
        "steps": steps,
        "before": {k: before[k] for k in keys},
        "after": {k: after[k] for k in keys},
        "train_seconds": trained - started,
        "total_seconds": time.perf_counter() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
      }
    )
  )


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True, help="stories260k/hf")
  parser.add_argument("--pairs", required=True, help="pairs.jsonl.gz")
  parser.add_argument("--held-out", type=int, default=100)
  parser.add_argument("--epochs", type=float, default=2)
  parser.add_argument("--batch-size", type=int, default=16)
  parser.add_argument("--learning-rate", type=float, default=1e-3)
  parser.add_argument("--beta", type=float, default=0.1)
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--seed", type=int, default=42)
  parser.add_argument("--checkpointing", action="store_true")
  return parser.parse_args()


if __name__ == "__main__":
  main()
