"""How fast attention over packed pairs is, and how far from the dense mask.

  python scripts/benchmarks/attention.py --dtype=bfloat16 --rows=4 --tokens=4096
  python scripts/benchmarks/attention.py --pairs=512,128,128 --heads=32 \\
    --kv_heads=8 --head_dim=128 --window=1024 --cap=50

Rows are mirrored pairs of the lengths given, packed side by side (see
dpo_jax/batch.py). For each implementation that the device runs it prints the
milliseconds of a forward, and of a forward and backward together; the TFLOP/s
over visible (query, key) pairs, 4 H h each forward and 10 H h more backward,
whatever is computed besides; the temporary memory of the latter; and the
largest difference of value and gradients from the dense mask in float32,
relative to the largest entry. A CPU runs it too: leave out --dtype and make it
small. docs/attention.md has what was measured.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.pack import Example, RowShape, empty_batch, fill_row
from dpo_jax.models import attention
from dpo_jax.models.blockwise import Window

_NAMES = ("attention", "dq", "dk", "dv")


def make_rows(rows, tokens, pairs):
  """Packed rows of as many pairs as fit, one length after the other."""
  batch = empty_batch(rows, RowShape(tokens, tokens, tokens))
  for row in range(rows):
    some, left, at = [], tokens, row
    while True:
      prompt, chosen, rejected = pairs[at % len(pairs)]
      left, at = left - (prompt - 1 + chosen + rejected), at + 1
      if left < 0:
        break
      some.append(
        Example(*(np.ones(n, np.int32) for n in (prompt, chosen, rejected)))
      )
    if not some:
      raise SystemExit(f"--tokens={tokens}: no pair of --pairs fits")
    fill_row(batch, row, some)
  return batch


def count_visible(batch, window):
  """Pairs of a query and a key that it sees, over all rows."""
  if window is None:
    return int((batch.key_end - batch.key_start).sum(dtype=np.int64))
  keys, count = np.arange(batch.tokens.shape[1]), 0
  for start, end, at in zip(batch.key_start, batch.key_end, batch.positions):
    seen = (keys >= start[:, None]) & (keys < end[:, None])
    count += int((seen & (at > at[:, None] - window)).sum())
  return count


def milliseconds(function, inputs, repeats):
  """The median of `repeats` calls, after one that is not counted."""
  jax.block_until_ready(function(*inputs))
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    times.append(1e3 * (time.perf_counter() - begin))
  return statistics.median(times)


def make_calls(batch, args, how):
  """Compiled forward, and forward with backward, of (q, k, v, gradient)."""
  start, end, at = map(
    jnp.asarray, (batch.key_start, batch.key_end, batch.positions)
  )
  window = Window(at - args.window + 1, at) if args.window else None
  attend = functools.partial(
    attention.attention, implementation=how, cap=args.cap or None
  )

  def forward(q, k, v, start, end, window):
    return attend(q, k, v, start, end, window=window)

  def both(q, k, v, g, start, end, window):
    out, pull_back = jax.vjp(
      lambda *x: attend(*x, start, end, window=window), q, k, v
    )
    return out, *pull_back(g)

  return (
    lambda q, k, v, g: (jax.jit(forward), (q, k, v, start, end, window)),
    lambda q, k, v, g: (jax.jit(both), (q, k, v, g, start, end, window)),
  )


def errors(found, expected):
  """Largest difference of each, relative to the largest entry."""
  return [
    float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
    for a, b in zip(found, expected)
  ]


def parse(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--rows", type=int, default=2)
  parser.add_argument("--tokens", type=int, default=1024)
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--kv_heads", type=int, default=2)
  parser.add_argument("--head_dim", type=int, default=64)
  parser.add_argument(
    "--pairs", nargs="+", default=["256,128,128"],
    help="prompt,chosen,rejected in tokens; several take turns",
  )  # fmt: skip
  parser.add_argument("--window", type=int, default=0, help="0: none")
  parser.add_argument("--cap", type=float, default=0.0, help="0: none")
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default="float32"
  )
  parser.add_argument(
    "--implementations", nargs="+", choices=attention.IMPLEMENTATIONS[1:],
    help="default: all that this device runs as they are meant to be run",
  )  # fmt: skip
  parser.add_argument("--repeats", type=int, default=10)
  return parser.parse_args(argv)


def main(argv=None):
  args, device = parse(argv), jax.devices()[0]
  pairs = [tuple(map(int, text.split(","))) for text in args.pairs]
  batch = make_rows(args.rows, args.tokens, pairs)
  visible = count_visible(batch, args.window or None)
  rng = np.random.default_rng(0)
  q, k, v, g = (
    jnp.asarray(
      rng.normal(size=(args.rows, args.tokens, heads, args.head_dim)),
      args.dtype,
    )
    for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
  )
  wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
  with jax.default_matmul_precision("highest"):
    function, inputs = make_calls(batch, args, "dense")[1](*wide)
    expected = function(*inputs)
  names = args.implementations or [
    name
    for name in attention.IMPLEMENTATIONS[1:]
    if attention.is_native(name, device)
  ]
  print(
    f"{device.device_kind}, {args.dtype}: {args.rows} rows of {args.tokens}"
    f" tokens, heads {args.heads} over {args.kv_heads} of {args.head_dim},"
    f" {visible / args.rows / args.tokens:.0f} keys a query,"
    f" {int(batch.weights.sum())} pairs"
  )
  print(
    "implementation  forward ms  TFLOP/s    both ms  TFLOP/s  temp MB"
    f"   error of {', '.join(_NAMES)}"
  )
  tera = 1e-12 * visible * args.heads * args.head_dim
  for name in names:
    forward, both = (call(q, k, v, g) for call in make_calls(batch, args, name))
    compiled = both[0].lower(*both[1]).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes / 1e6
    once = milliseconds(*forward, args.repeats)
    twice = milliseconds(compiled, both[1], args.repeats)
    off = " ".join(f"{x:.1e}" for x in errors(compiled(*both[1]), expected))
    print(
      f"{name:14s} {once:11.2f} {4e3 * tera / once:8.2f}"
      f" {twice:10.2f} {14e3 * tera / twice:8.2f} {temp:8.1f}   {off}"
    )


if __name__ == "__main__":
  main()
