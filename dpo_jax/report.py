"""One self-contained page per run: what changed, how, on what data.

`write_report(directory)` reads `metrics.jsonl`, `summary.json` and
`samples.jsonl` and writes `report.html`: inline SVG and CSS, no script, no
network. Text of models and datasets is escaped, and the page's own content
policy forbids scripts and requests.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpo_jax.errors import DataError
from dpo_jax.svg import Guide, Series, format_value, line_chart, smooth
from dpo_jax.writers import FILE_NAME, read_metrics

MAX_SAMPLES = 20
_MAX_TEXT = 6000

Row = Mapping[str, Any]

Curve = dict[int, float]
Curves = Mapping[tuple[str, str], Curve]  # Keys are (split, metric).

# Metric, its name, and whether more of it is better.
_HEADLINE = (
  ("loss", "loss", False),
  ("rewards/accuracies", "accuracy", True),
  ("rewards/margins", "margin", True),
)
_UNPAIRED = ("kto", "bco", "sft", "apo_zero_unpaired")
_NO_REFERENCE = ("orpo", "simpo", "cpo", "sft")

# All but tab and newline, and the marks that reorder the text around them.
_CONTROLS = {
  code: f"[U+{code:04X}]"
  for code in (
    *range(9),
    *range(11, 32),
    *range(127, 160),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
  )
}

# What the data pipeline's counters mean, in words for the page.
REASONS = {
  "empty_response": "a response has no text, so there is nothing to score",
  "identical_responses": "chosen and rejected are the same text",
  "identical_after_cut": "chosen and rejected are the same once cut to the"
  " length limit",
  "empty_prompt": "the prompt has no text",
  "wrong_shape": "the row lacks the fields of the detected format, or they"
  " have another type",
  "bad_value": "a field holds a value that cannot be used, such as a label"
  " that is neither true nor false",
  "bad_text": "the text is not valid Unicode",
  "prompt_cut": "the prompt was too long: its beginning was cut",
  "response_cut": "a response was too long: its end was cut",
  "boundary_moved": "the tokenizer merged text across the end of the prompt;"
  " the split moved to the last token that both sides share",
  "extra_turns": "the conversation went on after the scored response; later"
  " turns were left out",
  "undesirable_skipped": "marked undesirable, and this method learns from"
  " desirable examples only",
}

_CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--surface:#fff;--ink:#1b2430;
--muted:#5b6878;--grid:#e6e9ee;--line:#dde2e9;--chosen:#1d5fd1;
--rejected:#c2500a;--train:#4a5a70;--eval:#8a2fb0;--good:#0c7a45;--bad:#b3261e;
--note:#fff6e0;--noteline:#e0a526}
@media (prefers-color-scheme:dark){:root{--bg:#0f1319;--surface:#171c24;
--ink:#e6eaf0;--muted:#9aa7b8;--grid:#283040;--line:#2b3443;--chosen:#74aaff;
--rejected:#ff9d5c;--train:#a9b7ca;--eval:#d79bf0;--good:#5fd39a;--bad:#ff8a80;
--note:#2b2412;--noteline:#a37a1c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:18px;margin:38px 0 12px}
h3{font-size:14.5px;margin:0 0 2px}
p{margin:0 0 10px}
.facts,.sub,small{color:var(--muted)}
small{display:inline-block;line-height:1.4}
.facts{margin:4px 0 20px;overflow-wrap:anywhere}
.sub{font-size:13px;margin:0 0 8px}
.lead{font-size:18px;line-height:1.5;margin:0 0 16px;max-width:62em}
.card{background:var(--surface);border:1px solid var(--line);
border-radius:10px;padding:14px 16px}
.tiles,.main,.charts,.small,.pair{display:grid;gap:14px}
.tiles{grid-template-columns:repeat(auto-fill,minmax(186px,1fr))}
.main{grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));
margin:14px 0}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.tile b{display:block;font-size:22px;font-variant-numeric:tabular-nums;
white-space:nowrap}
.tile b span{color:var(--muted);font-weight:400}
.better{color:var(--good)}.worse{color:var(--bad)}
.note{background:var(--note);border:1px solid var(--noteline);
border-left-width:5px;border-radius:8px;padding:12px 16px;margin:16px 0}
.note p:last-child{margin:0}
.main .card,.charts .card{display:flex;flex-direction:column}
svg{display:block;width:100%;height:auto;margin-top:auto}
.main svg,.small svg{max-width:500px;align-self:center}
.hover rect:hover{fill:var(--ink);opacity:.07}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{padding:4px 14px 4px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--grid);overflow-wrap:anywhere}
th{font-weight:600}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;
width:1%}
td:first-child,td.k{white-space:nowrap;width:1%;padding-right:24px}
td.k{padding-right:14px}td.n{padding-right:12px}
code,pre{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.sample{margin-bottom:14px}
.pair{grid-template-columns:repeat(2,minmax(0,1fr));margin-top:10px}
.said{white-space:pre-wrap;overflow-wrap:anywhere;max-height:21em;
overflow:auto;font-size:14px;unicode-bidi:isolate}
.side{border-top:3px solid var(--line);padding-top:6px}
.side.after{border-color:var(--chosen)}
details{margin-top:14px}summary{cursor:pointer;font-weight:600}
.two{display:grid;gap:14px;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
@media (max-width:620px){.pair{grid-template-columns:1fr}}
@media print{body{background:none;font-size:11pt}main{padding:0;max-width:none}
.card,.note{break-inside:avoid}.sample{break-inside:auto}
.said{max-height:none}h2,h3,.sub{break-after:avoid}.hover{display:none}
.charts{grid-template-columns:1fr 1fr}
.main,.small{grid-template-columns:1fr 1fr 1fr}}
"""


def write_report(directory: str | os.PathLike) -> Path:
  """Writes `directory/report.html` and returns its path."""
  directory = Path(directory)
  rows = read_metrics(directory / FILE_NAME)
  summary = _read_summary(directory / "summary.json")
  samples = _read_samples(directory / "samples.jsonl")
  path = directory / "report.html"
  temporary = path.with_name(path.name + ".tmp")
  # Lone surrogates, which JSON can carry and UTF-8 cannot, become "?".
  temporary.write_text(
    render(rows, summary, samples), encoding="utf-8", errors="replace"
  )
  temporary.replace(path)
  return path


def render(
  rows: Sequence[Row], summary: Row, samples: Sequence[Row] = ()
) -> str:
  """The page for these metric rows, this summary and these samples."""
  curves = _curves(rows)
  names = [str(summary.get("method") or "").upper(), summary.get("model")]
  title = ": ".join(str(name) for name in names if name) or "Training run"
  before, after, basis = _endpoints(curves, summary)
  body = [
    f"<h1>{_text(title)}</h1>",
    f'<p class="facts">{_facts(summary)}</p>',
    _headline(before, after, basis, summary),
    _notes(before, after, basis, curves, summary),
    _charts(curves, summary),
    _samples(samples),
    _data(summary),
    _run(summary),
  ]
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy"'
    " content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    f"<title>{_text(title)}</title><style>{_CSS}</style></head>"
    f"<body><main>{''.join(body)}</main></body></html>\n"
  )


def _read_summary(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    summary = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise DataError(f"{path}: not readable as JSON ({error})") from error
  if not isinstance(summary, dict):
    raise DataError(f"{path}: expected a JSON object")
  return summary


def _read_samples(path: Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  rows = []
  lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError:
      if number == len(lines):  # Cut by a kill.
        break
      raise DataError(f"{path}, line {number}: not JSON") from None
    if isinstance(row, dict):
      rows.append(row)
  return rows


def _curves(rows: Iterable[Row]) -> dict[tuple[str, str], Curve]:
  """(split, metric) -> {step: value}, by step; a later row wins."""
  curves: dict[tuple[str, str], Curve] = {}
  for row in sorted(rows, key=lambda row: row["step"]):
    for key, value in row.items():
      if key not in ("step", "split") and isinstance(value, (int, float)):
        split = str(row.get("split", "train"))
        curves.setdefault((split, key), {})[row["step"]] = float(value)
  return curves


def _endpoints(
  curves: Curves, summary: Row
) -> tuple[dict[str, float], dict[str, float], str]:
  """Metrics before and after, and the words for what they were taken on."""
  before, after = (
    {k: float(v) for k, v in (summary.get(name) or {}).items() if _number(v)}
    for name in ("initial_eval", "final_eval")
  )
  if before and after:
    return before, after, "held-out"
  evals = {k: c for (split, k), c in curves.items() if split == "eval"}
  if any(len(curve) > 1 for curve in evals.values()):
    evals = {k: list(c.values()) for k, c in evals.items() if len(c) > 1}
    first = {k: c[0] for k, c in evals.items()}
    return first, {k: c[-1] for k, c in evals.items()}, "held-out"
  before, after = {}, {}
  for (split, key), curve in curves.items():
    values = [v for v in curve.values() if math.isfinite(v)]
    if split == "train" and len(values) > 1:
      part = max(1, len(values) // 10)
      before[key] = sum(values[:part]) / part
      after[key] = sum(values[-part:]) / part
  return before, after, "training"


def _number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def _text(value: Any) -> str:
  """Escaped text; control characters are named instead of obeyed."""
  return escape(str(value).replace("\r\n", "\n").translate(_CONTROLS))


def _facts(summary: Row) -> str:
  parts = []
  if _number(summary.get("parameters")):
    parts.append(f"{_count(summary['parameters'])} parameters")
  data = summary.get("dataset") or {}
  if data.get("source"):
    parts.append(str(data["source"]))
  if _number(summary.get("steps")):
    steps = f"{summary['steps']:,} steps"
    if _number(summary.get("batch_size")):
      steps += f" of {summary['batch_size']:,} {_noun(summary)}"
    parts.append(steps)
  if _number(summary.get("wall_seconds")):
    parts.append(_duration(summary["wall_seconds"]))
  if summary.get("device"):
    parts.append(str(summary["device"]))
  return " · ".join(map(_text, parts))


def _noun(summary: Row) -> str:
  return "examples" if summary.get("method") in _UNPAIRED else "pairs"


def _count(n: float) -> str:
  for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if n >= size:
      return f"{n / size:.3g}{letter}"
  return f"{n:.0f}"


def _duration(seconds: float) -> str:
  seconds = round(seconds)
  hours, minutes = seconds // 3600, seconds // 60 % 60
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _headline(before: Row, after: Row, basis: str, summary: Row) -> str:
  where = "On held-out data" if basis == "held-out" else "On training batches"
  tiles, clauses = [], []
  for key, name, more_is_better in _HEADLINE:
    if key not in before or key not in after:
      continue
    a, b = before[key], after[key]
    tiles.append(_tile(f"{basis} {name}", a, b, more_is_better))
    verb = "rose" if b > a else "fell" if b < a else "stayed"
    clauses.append(
      f"{name} {verb} from {format_value(a)} to {format_value(b)}"
      if b != a
      else f"{name} stayed at {format_value(a)}"
    )
  sentences = [f"{where}, {_and(clauses)}."] if clauses else []
  reward = summary.get("true_reward") or {}
  a, b = reward.get("before"), reward.get("after")
  if _number(a) and _number(b):
    tiles.append(_tile("true reward", a, b, True))
    verb = "rose" if b > a else "fell" if b < a else "did not change:"
    sentences.append(
      f"The true reward of sampled responses {verb} from {format_value(a)} to"
      f" {format_value(b)}."
    )
  kl = summary.get("kl_to_reference")
  if _number(kl):
    tiles.append(
      f'<div class="card tile"><h3>KL to reference</h3><b>{format_value(kl)}'
      " <span>nats</span></b><small>per response; 0 where the policy is still"
      " the reference</small></div>"
    )
    sentences.append(
      f"The policy is {format_value(kl)} nats per response away from the"
      " reference."
    )
  if basis == "training" and clauses:
    sentences.append(
      "No held-out evaluation was found: these are means of the first and the"
      " last tenth of the training rows."
    )
  lead = " ".join(sentences) or "This run holds no metrics to compare yet."
  return f'<p class="lead">{lead}</p><div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, a: float, b: float, more_is_better: bool) -> str:
  if a == b:
    change = "no change"
  else:
    good = (b > a) == more_is_better
    sign = "+" if b > a else ""
    change = (
      f'<span class="{"better" if good else "worse"}">'
      f"{sign}{format_value(b - a)}, {'better' if good else 'worse'}</span>"
    )
  return (
    f'<div class="card tile"><h3>{name[0].upper()}{name[1:]}</h3>'
    f"<b><span>{format_value(a)} →</span> {format_value(b)}</b>"
    f"<small>{change}</small></div>"
  )


def _and(parts: Sequence[str]) -> str:
  *most, last = parts
  return f"{', '.join(most)} and {last}" if most else last


def displaced(before: Row, after: Row, basis: str = "held-out") -> str | None:
  """The metric that shows the chosen side falling while accuracy rose."""
  accuracy = "rewards/accuracies"
  if not after.get(accuracy, 0) > before.get(accuracy, math.inf):
    return None
  # Batches differ in length, so on training rows only rewards compare.
  keys = ("logps/chosen", "rewards/chosen")
  for key in keys if basis == "held-out" else keys[::-1]:
    if key in before and key in after:
      return key if after[key] < before[key] - 1e-3 else None
  return None


def _notes(
  before: Row,
  after: Row,
  basis: str,
  curves: Curves,
  summary: Row,
) -> str:
  notes = []
  key = displaced(before, after, basis)
  if key:
    both = f"Chosen went from {_change(before, after, key)}"
    rejected = key.replace("chosen", "rejected")
    if rejected in before and rejected in after:
      both += f", rejected from {_change(before, after, rejected)}"
    what = "log-probability" if key.startswith("logps") else "reward"
    notes.append(
      f"<p><strong>The chosen {what} fell although accuracy rose.</strong>"
      f" {both}. This is likelihood displacement, and common: the objective"
      " only asks that the gap between chosen and rejected widens, and pushing"
      " both down is one way to widen it. The probability goes to other"
      " responses, so read the samples below.</p><p>If it hurts: add an SFT"
      " term on the chosen response (RPO), use a loss that anchors the chosen"
      " side (DPO-Positive, APO-zero, KTO), or move less: a lower learning"
      " rate, or a larger beta where the method has a reference.</p>"
    )
  reward = summary.get("true_reward") or {}
  a, b = reward.get("before"), reward.get("after")
  accuracy = "rewards/accuracies"
  rose = after.get(accuracy, 0) > before.get(accuracy, math.inf)
  if _number(a) and _number(b) and b < a and rose:
    notes.append(
      "<p><strong>Accuracy rose but the true reward fell.</strong> The policy"
      " ranks the pairs better and writes worse: a sign of over-optimisation."
      " Try fewer steps, a larger beta or a lower learning rate.</p>"
    )
  held_out = curves.get(("eval", "loss"), {})
  finite = {s: v for s, v in held_out.items() if math.isfinite(v)}
  if len(finite) > 2:
    best, last = min(finite, key=finite.__getitem__), max(finite)
    if finite[last] > 1.02 * finite[best] > 0:
      notes.append(
        f"<p><strong>Held-out loss was lowest at step {best:,}</strong>"
        f" ({format_value(finite[best])}) and is {format_value(finite[last])}"
        " at the end: an earlier checkpoint may be the better one.</p>"
      )
  skipped = summary.get("skipped_steps")
  loss = curves.get(("train", "loss"), {})
  bad = [step for step, value in loss.items() if not math.isfinite(value)]
  if bad or (_number(skipped) and skipped > 0):
    n = skipped if _number(skipped) and skipped else len(bad)
    steps = ", ".join(f"{step:,}" for step in bad[:8])
    steps += " …" if len(bad) > 8 else ""
    notes.append(
      f"<p><strong>{n:,} {'step' if n == 1 else 'steps'} skipped</strong>"
      " because the loss or a gradient was not finite"
      f"{f' (step {steps})' if steps else ''}; the curves have gaps there.</p>"
    )
  return "".join(f'<div class="note">{note}</div>' for note in notes)


def _change(before: Row, after: Row, key: str) -> str:
  return f"{format_value(before[key])} to {format_value(after[key])}"


def _lines(curves: Curves, key: str, name: str, color: str) -> list[Series]:
  """A metric in both splits; `name` is empty where it has its own plot."""
  out = []
  of = f"{name}, " if name else ""
  train = curves.get(("train", key), {})
  x, y = list(train), list(train.values())
  train_color = color or "var(--train,#4a5a70)"
  label = name or "train"
  window = len(x) // 20 * 2 + 1
  if key == "learning_rate":  # Not a noisy measurement.
    window = 1
  if window > 1:
    raw = f"{of}train, each row"
    out.append(Series(raw, x, y, train_color, "thin", legend=not name))
    smoothed = f"{of}train, mean of {window}"
    x, y = smooth(x, y, window)
    out.append(Series(smoothed, x, y, train_color, end_label=label))
  elif x:
    out.append(Series(f"{of}train", x, y, train_color, end_label=label))
  held_out = curves.get(("eval", key), {})
  if held_out:
    out.append(
      Series(
        f"{of}eval",
        list(held_out),
        list(held_out.values()),
        color or "var(--eval,#8a2fb0)",
        "dots",
        end_label=(None if x else name) if name else "eval",
      )
    )
  return out


def _charts(curves: Curves, summary: Row) -> str:
  noun = _noun(summary)
  zero = [Guide(0.0)]
  start = (summary.get("initial_eval") or {}).get("loss")
  log2 = []
  if _number(start) and abs(start - math.log(2)) < 1e-3:
    log2 = [Guide(math.log(2), "ln 2: equal to the reference")]
  free = summary.get("method") in _NO_REFERENCE
  reward_words = (
    "β × log-probability: this method has no reference."
    if free
    else "β × log-ratio to the reference. Below 0: less likely than there."
  )
  both = ("chosen", "rejected")
  rewards = [f"rewards/{side}" for side in both]
  logps = [f"logps/{side}" for side in both]
  large = (
    ("Loss", "Lower is better.", "loss", ["loss"], log2),
    (
      "Accuracy",
      "Share of pairs whose chosen response has the higher reward; a tie"
      " counts half.",
      "fraction of pairs",
      ["rewards/accuracies"],
      [Guide(0.5, "chance")],
    ),
    (
      "Reward margin",
      "Chosen minus rejected reward: how far apart the policy puts them.",
      "reward (β × nats)",
      ["rewards/margins"],
      zero,
    ),
    (
      "Rewards",
      reward_words,
      "reward (β × nats)",
      rewards,
      [] if free else zero,
    ),
    (
      "Log-probabilities",
      "Of whole responses. The margin can widen while both fall.",
      "nats per response",
      logps,
      [],
    ),
  )
  small = (
    ("Gradient norm", "global L2 norm", "grad_norm"),
    ("Learning rate", "per step", "learning_rate"),
    ("KL estimate", "nats per response", "kl"),
    ("NLL of the chosen response", "nats", "nll_loss"),
    ("Throughput", f"{noun} per second", "pairs_per_second"),
  )
  narrow, wide, seen = [], [], {key for *_, key in small}
  for title, sub, y_label, keys, guides in large:
    seen.update(keys)
    series = []
    for key in keys:
      side = key.split("/")[-1] if len(keys) > 1 else ""
      series += _lines(curves, key, side, f"var(--{side})" if side else "")
    y_range = (0.0, 1.0) if title == "Accuracy" else ()
    svg = line_chart(
      series,
      title=title,
      y_label=y_label,
      guides=guides,
      y_range=y_range,
      size=(560, 290) if len(keys) > 1 else (400, 270),
    )
    if svg:
      (wide if len(keys) > 1 else narrow).append(
        f'<div class="card"><h3>{title}</h3><p class="sub">{sub}</p>{svg}</div>'
      )
  little = [_small(curves, *spec) for spec in small]
  others = sorted({key for _, key in curves} - seen)
  more = "".join(_small(curves, _text(key), "", key) for key in others)
  if more:
    more = f'<details><summary>Other metrics</summary><div class="small">{more}'
    more += "</div></details>"
  return (
    f'<h2>Curves</h2><div class="main">{"".join(narrow)}</div>'
    f'<div class="charts">{"".join(wide)}</div>'
    f'<div class="small">{"".join(little)}</div>{more}'
  )


def _small(curves: Curves, title: str, unit: str, key: str) -> str:
  series = _lines(curves, key, "", "")
  if not any(s.style == "dots" for s in series):
    series = [
      Series(s.name, s.x, s.y, s.color, s.style, False, s.end_label and "")
      for s in series
    ]
  svg = line_chart(series, title=title, y_label=unit, size=(360, 200))
  return f'<div class="card"><h3>{title}</h3>{svg}</div>' if svg else ""


def _samples(samples: Sequence[Row]) -> str:
  if not samples:
    return ""

  def step(row: Row) -> float:
    return row["step"] if _number(row.get("step")) else -1

  shown = sorted(samples, key=step, reverse=True)[:MAX_SAMPLES]
  some = ""
  if len(samples) > len(shown):
    some = f" The latest {len(shown)} of {len(samples):,}."
  out = [
    "<h2>Samples before and after</h2>",
    '<p class="sub">Written by the models from prompts of the dataset; nothing'
    f" was filtered and some of it may offend.{some}</p>",
  ]
  for row in shown:
    head = f"Prompt, step {row['step']:,}" if step(row) >= 0 else "Prompt"
    sides = []
    for side in ("before", "after"):
      reward = row.get(f"reward_{side}")
      score = f", reward {format_value(reward)}" if _number(reward) else ""
      sides.append(
        f'<div class="side {side}"><h3>{side.capitalize()}{score}</h3>'
        f"{_said(row.get(side))}</div>"
      )
    out.append(
      f'<div class="card sample"><h3>{head}</h3>{_said(row.get("prompt"))}'
      f'<div class="pair">{"".join(sides)}</div></div>'
    )
  return "".join(out)


def _said(text: Any) -> str:
  if text is None or text == "":
    return '<div class="said"><small>(empty)</small></div>'
  text = str(text)
  rest = len(text) - _MAX_TEXT
  cut = f"<small> … {rest:,} more characters</small>" if rest > 0 else ""
  return f'<div class="said" dir="auto">{_text(text[:_MAX_TEXT])}{cut}</div>'


def _data(summary: Row) -> str:
  cards = []
  for title, name in (("Training", "dataset"), ("Held-out", "eval_dataset")):
    data = summary.get(name)
    if not data:
      continue
    known = [
      (key.capitalize(), _value(data[key], ","))
      for key in ("source", "format", "rows", "examples")
      if data.get(key) is not None
    ]
    card = [f'<div class="card"><h3>{title} data</h3>{_table(known)}']
    told = [
      (head, {k: n for k, n in (data.get(key) or {}).items() if n})
      for head, key in (("Dropped", "dropped"), ("Changed", "changed"))
    ]
    for head, counts in told:
      if counts:
        card.append(f"<details open><summary>{head}</summary><table>")
        card.extend(
          f'<tr><td class="n">{_text(_value(n, ","))}</td>'
          f'<td class="k">{_text(key)}</td>'
          f"<td>{_text(REASONS.get(key, ''))}</td></tr>"
          for key, n in sorted(counts.items(), key=lambda item: -item[1])
        )
        card.append("</table></details>")
    if not any(counts for _, counts in told):
      card.append('<p class="sub">No row was dropped or changed.</p>')
    cards.append("".join(card) + "</div>")
  if not cards:
    return ""
  return f'<h2>Data</h2><div class="two">{"".join(cards)}</div>'


def _run(summary: Row) -> str:
  rows = [
    (name, summary[key])
    for name, key in (
      ("Command", "command"),
      ("Checkpoint", "checkpoint"),
      ("Model for serving", "model_dir"),
      ("Device", "device"),
    )
    if summary.get(key)
  ]
  rows += [(k, v) for k, v in (summary.get("throughput") or {}).items()]
  out = []
  if rows:
    out.append(f'<h2>Run</h2><div class="card">{_table(rows, "code")}</div>')
  for name, key in (("Config", "config"), ("Versions", "versions")):
    values = summary.get(key)
    if values:
      table = _table(sorted(values.items()), "code")
      out.append(
        f"<details><summary>{name}</summary>"
        f'<div class="card">{table}</div></details>'
      )
  return "".join(out)


def _table(rows: Iterable[tuple[str, Any]], tag: str = "span") -> str:
  lines = (
    f"<tr><td>{_text(name)}</td><td><{tag}>{_text(_value(value))}</{tag}></td>"
    for name, value in rows
  )
  return f"<table>{'</tr>'.join(lines)}</tr></table>"


def _value(value: Any, group: str = "") -> str:
  """A value as text; `group` separates the thousands of whole numbers."""
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:{group}}"
  if isinstance(value, float):
    return f"{value:.6g}"
  if isinstance(value, (dict, list, tuple)):
    return json.dumps(value, ensure_ascii=False)
  return str(value)
