"""A look at encoded data: counts, lengths, packing, and one row."""

import hashlib
import os

import numpy as np

from dpo_jax.config import Config
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples, check_rankings, load_examples
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.dry_run import render_row
from dpo_jax.errors import ConfigError
from dpo_jax.progress import row_bar

_PERCENTILES = (0, 25, 50, 75, 95, 99, 100)


def check(config: Config, *, visible: bool = False) -> str:
  """Reads `config.data.source` as training would and describes it.

  Args:
    config: tokenizer, data, loss (its kind of data) and batch size.
    visible: draw which tokens of row 0 see which.

  Raises:
    UserError: one line for what is missing or does not fit.
  """
  d, loss = config.data, config.make_loss()
  if config.online.method:
    raise ConfigError(
      f"config.online.method={config.online.method!r} reads prompts alone; look"
      " at them with --dry_run of scripts/train.py"
    )
  if not d.source:
    raise ConfigError("config.data.source is empty; name a file or TFDS folder")
  tokenizer = load_tokenizer(
    config.model.tokenizer or config.model.path or "bytes"
  )
  settings = EncodeSettings(
    d.max_length, d.max_prompt_length, loss.kind, d.on_bad_row
  )
  cache = os.path.expanduser(d.cache_dir)
  source = os.path.expanduser(d.source)
  with row_bar("encoding") as progress:
    examples = load_examples(
      source, d.split, tokenizer, settings, cache, progress, d.workers
    )
  check_rankings(examples, loss.responses)
  plan = Plan(
    examples,
    batch_size=config.train.batch_size,
    steps=max(1, len(examples) // config.train.batch_size),
    seed=config.seed,
    row_length=d.row_length,
    row_counts=d.row_counts,
    balance=d.balance,
    mismatch=loss.mismatches,
  )
  batch, _ = plan[0]
  lines = [
    *_counts(examples, 0 if d.eval_source else d.eval_rows),
    *_lengths(examples),
    *_packing(examples, plan),
    "row 0 of step 0",
    render_row(batch, 0, tokenizer),
  ]
  if visible:
    lines += ["mask of row 0 (a line a query, # where it sees the key)"]
    lines += _mask(batch, 0)
  return "\n".join(lines)


def _counts(examples: Examples, eval_rows: int) -> list[str]:
  report = examples.report
  held_out = f", the first {eval_rows} rows held out" if eval_rows else ""
  lines = [
    f"source      {report['source']}",
    f"format      {examples.format}, used as {examples.kind}",
    f"rows        {report['rows']} read, {len(examples)} examples{held_out}",
  ]
  for title in ("dropped", "changed"):
    counts = report[title]
    lines.append(f"{title:12s}{sum(counts.values())}")
    for reason, n in sorted(counts.items()):
      first = report["first_dropped"].get(reason) if title == "dropped" else ""
      lines.append(
        f"  {n:6d}  {reason}" + (f", first {first}" if first else "")
      )
  again, first = _repeated(examples)
  if again:
    lines.append(
      f"repeated    {again} examples are those of earlier rows, the first in"
      f" row {first} (they are kept)"
    )
  if examples.kind == "unpaired":
    liked = int(examples.desirable.sum())
    lines.append(f"labels      {liked} liked, {len(examples) - liked} not")
  if examples.kind == "ranked":
    found = np.bincount((examples.lengths > 0).sum(axis=1))
    sizes = [f"{n} of {k}" for k, n in enumerate(found) if n]
    lines.append(f"rankings    {', '.join(sizes)} responses")
  if examples.margins.any():
    told = examples.margins[examples.margins > 0]
    lines.append(
      f"margins     {len(told)} pairs have one, from {told.min():.3g} to"
      f" {told.max():.3g}"
    )
  names = [n for n in examples.subset_names if n]
  if names:
    lines.append(f"subsets     {', '.join(names)}")
  return lines


def _repeated(examples: Examples) -> tuple[int, int]:
  """How many examples were there before, token by token, and the data row (from
  0) of the first that was."""
  seen, again, first = set(), 0, -1
  for i in range(len(examples)):
    tokens = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
    digest = hashlib.sha256(tokens.tobytes())
    digest.update(examples.lengths[i].tobytes())
    digest.update(bytes(examples.desirable[i : i + 1]))
    if digest.digest() in seen:
      again, first = again + 1, int(examples.rows[i]) if first < 0 else first
    seen.add(digest.digest())
  return again, first


def _lengths(examples: Examples) -> list[str]:
  header = "".join(f"{'p' + str(p):>7s}" for p in _PERCENTILES)
  lines = [f"tokens      {header}"]
  columns = [("prompt", examples.prompt_lengths)]
  if examples.kind == "ranked":
    for k, lengths in enumerate(examples.lengths.T):
      columns.append((f"rank {k + 1}", lengths[lengths > 0]))
  elif examples.kind == "paired":
    columns.append(("chosen", examples.chosen_lengths))
    columns.append(("rejected", examples.rejected_lengths))
  else:
    columns.append(("response", examples.chosen_lengths))
  for name, lengths in columns:
    values = np.percentile(lengths, _PERCENTILES)
    lines.append(f"  {name:10s}" + "".join(f"{int(v):7d}" for v in values))
  return lines


def _packing(examples: Examples, plan: Plan) -> list[str]:
  prompt = examples.prompt_lengths.astype(np.int64)
  longest = prompt + examples.lengths.max(axis=1)  # KTO: of its completion
  sequences = (examples.lengths > 0).sum(axis=1)
  if examples.kind == "unpaired":
    sequences += 1  # with the mismatched completion
  padded = sum(
    int(sequences[members].sum() * longest[members].max())
    for members in map(plan.members, range(len(plan)))
  )
  packed = int(plan.row_tokens())
  return [
    *plan.describe(),
    f"            {packed / padded:.2f} of the tokens that padded, separate"
    " sequences would take",
  ]


def _mask(batch, row: int) -> list[str]:
  used = int((batch.key_end[row] > 0).sum())
  keys = np.arange(used)
  return [
    "".join(
      "#" if batch.key_start[row, i] <= k < batch.key_end[row, i] else "."
      for k in keys
    )
    for i in range(used)
  ]
