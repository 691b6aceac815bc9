"""Turns preference data into a TFDS directory in array_record.

    python scripts/prepare_data.py --input pairs.jsonl.gz --output data/pairs

Several splits in one go:

    python scripts/prepare_data.py --input a.jsonl --split train \\
        --input b.jsonl --split test --output data/pairs

Train on it with the directory as the data source. Wrong input gives one line
and exit status 2.
"""

import argparse
import sys

from dpo_jax.data.builder import prepare
from dpo_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--input", action="append", required=True, help="file of rows; repeatable"
  )
  parser.add_argument("--output", required=True, help="directory to create")
  parser.add_argument(
    "--split", action="append", help="name of each input's split (train)"
  )
  parser.add_argument(
    "--on_bad_row", choices=("error", "drop"), default="error"
  )
  args = parser.parse_args(argv)
  splits = args.split or ["train"]
  if len(splits) != len(args.input) or len({*splits}) != len(splits):
    print("expected one --split of its own for each --input", file=sys.stderr)
    return 2
  inputs = dict(zip(splits, args.input))
  try:
    done = prepare(inputs, args.output, args.on_bad_row)
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  counts = ", ".join(f"{n} rows in {name}" for name, n in done["rows"].items())
  print(f"{args.output}: {counts}, {done['dropped']} dropped")
  return 0


if __name__ == "__main__":
  sys.exit(main())
