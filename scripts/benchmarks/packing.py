"""How full batches are, and how many tokens they take beside padded ones.

  python scripts/benchmarks/packing.py [--data=PAIRS.jsonl --tokenizer=FOLDER]

Plans batches of 16, 64 and 256 pairs and prints a markdown table: the shapes
that are compiled (rows x tokens), the share of row tokens and of scored places
that is not padding, and the tokens through the layers, padding included, over
those of padded sequences (chosen and rejected stacked, each as long as the
batch's longest prompt and response). No token is run. Lengths are generated,
log-normal as `LIKE` has them, and with --data also those of a file: under the
tokenizer named, and under a byte-level BPE of 8192 pieces trained on its
chosen texts. docs/data.md has the results.
"""

import argparse
import gzip
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dpo_jax.data.encode_settings import EncodeSettings
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples, load_examples
from dpo_jax.data.tokenizer import HFTokenizer, load_tokenizer

SIZES = (16, 64, 256)


class Like(NamedTuple):
  """Log-normal lengths: medians, and standard deviations of their logs."""

  prompt: tuple[float, float]
  response: tuple[float, float]
  longest: int  # of prompt and response; half of it for the prompt


LIKE = {
  "HH-like": Like((103, 0.8), (40, 0.9), 1024),
  "TL;DR-like": Like((300, 0.35), (30, 0.4), 1024),
  "UltraFeedback-like": Like((120, 1.0), (260, 0.75), 2048),
}


class Packed(NamedTuple):
  shapes: str
  fill: float  # of row tokens
  scored_fill: float
  padded: float  # tokens, over those of padded and concatenated sequences


def generate(name: str, n: int = 20_000, seed: int = 0) -> Examples:
  """Pairs of generated lengths; all tokens are 0."""
  (p, ps), (r, rs), longest = LIKE[name]
  rng = np.random.default_rng(seed)
  prompts = rng.lognormal(np.log(p), ps, n).clip(4, longest // 2)
  lengths = rng.lognormal(np.log(r), rs, (n, 2)).clip(2)
  prompts = prompts.astype(np.int32)
  lengths = np.minimum(lengths.astype(np.int32), longest - prompts[:, None])
  offsets = np.concatenate([[0], np.cumsum(prompts + lengths.sum(axis=1))])
  return Examples(
    tokens=np.zeros(offsets[-1], np.int32),
    offsets=offsets.astype(np.int64),
    prompt_lengths=prompts,
    lengths=lengths,
    desirable=np.ones(n, bool),
    margins=np.zeros(n, np.float32),
    rows=np.arange(n),
    subsets=np.zeros(n, np.int32),
    subset_names=("",),
    kind="paired",
    format="generated",
    report={},
    fingerprint=name,
  )


def measure(examples: Examples, batch_size: int, **settings) -> Packed:
  """Plans three epochs, or a thousand steps, with the settings of a `Plan`."""
  steps = min(1000, 3 * len(examples) // batch_size)
  plan = Plan(examples, batch_size=batch_size, steps=steps, **settings)
  padded = 0
  for step in range(steps):
    prompts, lengths = plan.lengths(step)
    padded += 2 * batch_size * int((prompts[:, None] + lengths).max())
  return Packed(
    ", ".join(f"{s.rows} x {s.row.tokens}" for s in plan.shapes),
    plan.fill(),
    plan.scored_fill(),
    plan.row_tokens() / padded,
  )


def trained_tokenizer(path: str, pieces: int = 8192) -> HFTokenizer:
  """A byte-level BPE trained on the prompts and chosen answers of a file."""
  import tokenizers
  from tokenizers import models, pre_tokenizers, trainers

  def texts() -> Iterator[str]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
      for line in file:
        row = json.loads(line)
        yield row["prompt"] + row["chosen"]

  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = trainers.BpeTrainer(
    vocab_size=pieces,
    special_tokens=["<eos>"],
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  backend.train_from_iterator(texts(), trainer)
  files = {"tokenizer.json": backend.to_str()}
  return HFTokenizer(
    files | {"tokenizer_config.json": '{"eos_token": "<eos>"}'}
  )


def sources(data: str, tokenizer: str) -> Iterator[tuple[str, Examples]]:
  """Names and pairs of all rows of the table."""
  if data:
    named = {"its own BPE of 8192": trained_tokenizer(data)}
    if tokenizer:
      named[pathlib.Path(tokenizer).resolve().parent.name] = load_tokenizer(
        tokenizer
      )
    for name, one in named.items():
      examples = load_examples(data, "train", one, EncodeSettings(1024))
      yield f"{pathlib.Path(data).parent.name}, {name}", examples
  for name in LIKE:
    yield name, generate(name)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", default="")
  parser.add_argument("--tokenizer", default="")
  parser.add_argument("--balance", type=int, nargs="*", default=[0, 16])
  parser.add_argument("--shapes", type=int, default=4)
  parser.add_argument("--shards", type=int, default=1)
  args = parser.parse_args()
  print(
    "| lengths | pairs | balance | rows x tokens | row tokens filled | scored"
    " places filled | of padded |\n|---|---|---|---|---|---|---|"
  )
  for name, examples in sources(args.data, args.tokenizer):
    for batch_size in SIZES:
      for balance in args.balance:
        found = measure(
          examples, batch_size, balance=balance, row_counts=args.shapes,
          rows_multiple=args.shards,
        )  # fmt: skip
        print(
          f"| {name} | {batch_size} | {balance} | {found.shapes}"
          f" | {found.fill:.1%} | {found.scored_fill:.1%}"
          f" | {found.padded:.2f} |",
          flush=True,
        )


if __name__ == "__main__":
  main()
