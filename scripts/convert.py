"""Makes of one checkpoint another: of a run, a folder to serve; and both ways
between Hugging Face folders and orbax.

  python scripts/convert.py --from=runs/dpo --to=served [--step=3000]
  python scripts/convert.py --from=MODEL --to=SMALLER --dtype=bfloat16
  python scripts/convert.py --from=MODEL --adapter=ADAPTER --to=MERGED
  python scripts/convert.py --from=MODEL --to=VARIABLES --format=orbax
  python scripts/convert.py --from=VARIABLES --to=MODEL

A run may be stopped or still going; its newest checkpoint is taken. What lies
in --from is found out. --to appears when it is whole; a model's folder of that
name is replaced, anything else is left alone.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
  """Runs the command; wrong input is one line and exit status 2."""
  sys.path.insert(0, str(ROOT))
  from dpo_jax.convert import DTYPES, FORMS, convert
  from dpo_jax.errors import ConfigError
  from dpo_jax.main import guard

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--from", required=True, dest="source", help="work directory or folder"
  )
  parser.add_argument(
    "--to", required=True, dest="target", help="folder to write"
  )
  parser.add_argument("--format", choices=FORMS, default="hf", help="of --to")
  parser.add_argument("--step", type=int, help="of a run (its newest)")
  parser.add_argument(
    "--adapter", default="", help="PEFT folder to merge into a model's"
  )
  parser.add_argument(
    "--dtype", choices=DTYPES, default="", help="of the weights (as they are)"
  )
  parser.add_argument(
    "--max_shard_gb", type=float, default=5.0, help="most GiB of a file (5)"
  )
  args = parser.parse_args(argv)
  with guard(goes_on=True):
    if not 0 < args.max_shard_gb < 2**20:
      raise ConfigError(f"--max_shard_gb={args.max_shard_gb} should be above 0")
    line = convert(
      args.source,
      args.target,
      form=args.format,
      step=args.step,
      dtype=args.dtype,
      max_shard_bytes=int(args.max_shard_gb * 2**30),
      adapter=args.adapter,
    )
    print(line)


if __name__ == "__main__":
  main()
