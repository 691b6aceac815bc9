"""The page: metrics.jsonl, summary.json and samples.jsonl as report.html.

Inline SVG and CSS, no script, no network. Text of models and datasets is
escaped, and the page's own content policy forbids scripts and requests.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from dpo_jax.errors import DataError
from dpo_jax.files import write_whole
from dpo_jax.report.charts import charts, curves_of
from dpo_jax.report.findings import changes, headline, notes
from dpo_jax.report.markup import details, div, spell, table, text
from dpo_jax.report.reasons import REASONS
from dpo_jax.report.style import CSS
from dpo_jax.report.ticks import format_value, is_number
from dpo_jax.writers import FILE_NAME, read_metrics

MAX_SAMPLES = 20

# Name, format and unit of what a summary says of the machine.
_SPEED = {
  "pairs_per_second": ("Examples a second", "{:,.4g}", 1),
  "tokens_per_second": ("Tokens a second, without padding", "{:,.0f}", 1),
  "mfu": ("Of the devices' peak FLOP/s (MFU)", "{:.1%}", 1),
  "data_wait": ("Of the time in steps waiting for data", "{:.1%}", 1),
  "goodput": ("Of the time since its start in steps", "{:.1%}", 1),
  "rollout_seconds": ("Seconds of a step that answers took", "{:,.3g}", 1),
  "update_seconds": ("Seconds of a step that updates took", "{:,.3g}", 1),
  "peak_memory_bytes": ("Memory of the fullest device", "{:.2f} GiB", 2**-30),
}
_PAGE = Template("""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title><style>$css</style></head>
<body><main><h1>$title</h1>$body</main></body></html>
""")


def write_report(
  directory: str | os.PathLike, summary: Mapping[str, Any] | None = None
) -> Path:
  """Writes `directory/report.html` and returns its path.

  Args:
    directory: of a run.
    summary: of the run, as JSON has it; None reads what lies there.

  Raises:
    DataError: a file is missing or damaged, or the page cannot be written.
  """
  directory = Path(directory)
  curves = curves_of(read_metrics(directory / FILE_NAME))
  if summary is None:
    (summary,) = _read(directory / "summary.json") or [{}]
  summary = {k: v for k, v in summary.items() if v is not None}
  method = str(summary.get("method", ""))
  names = [method.upper(), str(summary.get("model", ""))]
  changed, held_out = changes(curves)
  body = [
    f'<p class="facts">{_facts(summary)}</p>',
    headline(changed, held_out, summary),
    notes(changed, held_out, curves, summary),
    charts(curves, method),
    _calibration(summary.get("calibration")),
    _samples(_read(directory / "samples.jsonl")),
    _data(summary),
    _run(summary),
  ]
  title = text(": ".join(filter(None, names)) or "Training run")
  page = _PAGE.substitute(title=title, css=CSS, body="".join(body))
  path = directory / "report.html"
  write_whole(path, page)
  return path


def _read(path: Path) -> list[dict[str, Any]]:
  """The JSON objects of a file, one per line in .jsonl; none without it."""
  content = path.read_bytes() if path.exists() else b""
  parts = content.splitlines() if path.suffix == ".jsonl" else [content]
  try:
    return [json.loads(part) for part in parts if part]
  except ValueError as error:
    raise DataError(f"{path}: not readable as JSON ({error})") from None


def _facts(summary: Mapping[str, Any]) -> str:
  facts = [f"{key} {spell(v)}" for key, v in summary.get("loss", {}).items()]
  if "parameters" in summary:
    facts.append(f"{summary['parameters']:,} parameters")
  facts.append(summary.get("dataset", {}).get("source"))
  if "steps" in summary and "batch_size" in summary:
    facts.append(
      f"{summary['steps']:,} steps of {summary['batch_size']:,} examples"
    )
  if "wall_seconds" in summary:
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    hours, minutes = divmod(minutes, 60)
    facts.append(
      f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    )
  facts.append(summary.get("device"))
  return " · ".join(text(fact) for fact in facts if fact)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
  if not samples:
    return ""
  few = samples[:MAX_SAMPLES]
  some = f" The first {len(few)} of {len(samples):,}."
  cards = []
  for row in few:
    sides = []
    for side in ("before", "after"):
      reward = row.get(f"reward_{side}")
      score = f", reward {format_value(reward)}" if is_number(reward) else ""
      head = f"<h3>{side.capitalize()}{score}</h3>"
      sides.append(div(f"side {side}", head, _said(row.get(side))))
    prompt = f"<h3>Prompt</h3>{_said(row.get('prompt'))}"
    cards.append(div("card sample", prompt, div("pair", *sides)))
  return (
    '<h2>Samples before and after</h2><p class="sub">Written by the models from'
    " prompts of the dataset; nothing was filtered and some of it may offend."
    f"{some}</p>{''.join(cards)}"
  )


def _calibration(found: Mapping[str, Any] | None) -> str:
  """How often a reward model is right, beside how often it says it is."""
  if not found or not found["bins"]:
    return ""
  lines = []
  for row in found["bins"]:
    low, high = row["interval"]
    lines.append(
      f"<tr><td>{row['from']:.2f} to {row['to']:.2f}</td>"
      f'<td class="n">{row["predicted"]:.3f}</td>'
      f'<td class="n">{row["observed"]:.3f}</td>'
      f'<td class="n">{low:.3f} to {high:.3f}</td>'
      f'<td class="n">{row["pairs"]:,}</td></tr>'
    )
  heads = ("Probability", "Mean", "Seen", "95 % interval", "Pairs")
  head = "".join(f"<th>{name}</th>" for name in heads)
  return (
    '<h2>Calibration</h2><p class="sub">How often the response that the model'
    " scores higher is the chosen one, by the probability that the scores give"
    " it, on all held-out pairs at the end. Expected calibration error"
    f" {format_value(found['error'])}.</p>"
    + div("card", f"<table><tr>{head}</tr>{''.join(lines)}</table>")
  )


def _said(words: str | None) -> str:
  said = text(words) if words else "<small>(empty)</small>"
  return f'<div class="said" dir="auto">{said}</div>'


def _data(summary: Mapping[str, Any]) -> str:
  cards = []
  for title, name in (("Training", "dataset"), ("Held-out", "eval_dataset")):
    data = summary.get(name)
    if not data:
      continue
    known = [
      (key.capitalize(), f"{value:,}" if is_number(value) else value)
      for key, value in data.items()
      if key in ("source", "format", "rows", "examples")
    ]
    if summary.get("eval_examples") and "eval_dataset" not in summary:
      known.append(("Held out", f"{summary['eval_examples']:,} of these"))
    card = [f"<h3>{title} data</h3>{table(known)}"]
    for head in ("Dropped", "Changed"):
      counts = data.get(head.lower(), {})
      lines = [
        f'<tr><td class="n">{n:,}</td><td class="k">{text(key)}</td>'
        f"<td>{REASONS.get(key, '')}</td></tr>"
        for key, n in sorted(counts.items(), key=lambda item: -item[1])
        if n
      ]
      if lines:
        rows = f"<table>{''.join(lines)}</table>"
        card.append(details(head, rows, opened=True))
    if len(card) == 1:
      card.append('<p class="sub">No row was dropped or changed.</p>')
    cards.append(div("card", *card))
  return f"<h2>Data</h2>{div('two', *cards)}" if cards else ""


def _run(summary: Mapping[str, Any]) -> str:
  keys = ("command", "checkpoint", "model_dir")
  names = ("Command", "Checkpoint", "Model for serving")
  rows = [(n, summary[k]) for n, k in zip(names, keys) if k in summary]
  if "row_tokens" in summary and "fill" in summary:
    fill = f"{summary['fill']:.1%} filled, the rest is padding"
    rows.append(
      ("Rows", f"up to {summary['row_tokens']:,} tokens each, {fill}")
    )
  rows += [
    (_SPEED[key][0], _SPEED[key][1].format(value * _SPEED[key][2]))
    if key in _SPEED and is_number(value)
    else (key, value)
    for key, value in summary.get("throughput", {}).items()
  ]
  out = [f"<h2>Run</h2>{div('card', table(rows))}"] if rows else []
  for key in ("config", "versions"):
    if key in summary:
      values = table(sorted(summary[key].items()))
      out.append(details(key.capitalize(), div("card", values)))
  return "".join(out)
