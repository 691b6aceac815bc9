"""The table of all losses, as text or markdown."""

from typing import Any

from dpo_jax.losses import registry
from dpo_jax.losses.loss import Loss
from dpo_jax.losses.making import make

COLUMNS = ("loss", "data", "reads", "log-probs", "defaults", "paper")
_DATA = {
  "paired": "pairs",
  "unpaired": "labels",
  "ranked": "rankings",
  "sft": "answers",
}


def describe() -> None:
  """Prints the table of all registered losses, those of others included."""
  print(table())


def table(*, markdown: bool = False, link: str = "") -> str:
  """One line a registered loss: name, data, what it reads beside the policy,
  how token log-probs enter, defaults, paper.

  Args:
    markdown: a markdown table instead of aligned text.
    link: folder of the losses' files, to link the names of ours to.
  """
  rows = [_row(name) for name in registry.names()]
  if markdown:
    if link:
      rows = [(_linked(name, link), *rest) for name, *rest in rows]
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
  widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
  return "\n".join(
    "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip()
    for line in (COLUMNS, *rows)
  )


def _row(name: str) -> tuple[str, ...]:
  loss, entry = make(name), registry.entry(name)
  options = ", ".join(f"{k}={_short(v)}" for k, v in loss.options)
  data = _DATA[loss.kind]
  return name, data, _reads(loss), entry.aggregation, options, entry.paper


def _reads(loss: Loss) -> str:
  parts = {
    "reference": loss.needs_reference,
    "lengths": any(n.endswith("_lengths") for n in loss.needs),
    "mismatched completions": loss.mismatches,
    "a third response": "policy_gold_logps" in loss.needs,
    "scores": loss.needs_scores,
    "whole batch": loss.batch_coupled,
    "state": "state" in loss.needs,
  }
  return ", ".join(name for name, there in parts.items() if there)


def _linked(name: str, link: str) -> str:
  module = registry.entry(name).function.__module__
  if not module.startswith("dpo_jax."):
    return f"`{name}`"
  return f"[`{name}`]({link}/{module.rpartition('.')[2]}.py)"


def _short(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
