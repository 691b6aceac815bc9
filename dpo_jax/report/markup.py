"""Text and values as safe HTML."""

import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any

# All but tab and newline, and the marks that reorder the text around them.
_CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def text(value: Any) -> str:
  """Escaped text; control characters are named instead of obeyed."""
  value = escape(str(value).replace("\r\n", "\n"))
  return _CONTROLS.sub(lambda match: f"[U+{ord(match[0]):04X}]", value)


def div(name: str, *parts: str) -> str:
  return f'<div class="{name}">{"".join(parts)}</div>'


def details(title: str, content: str, opened: bool = False) -> str:
  state = " open" if opened else ""
  return f"<details{state}><summary>{title}</summary>{content}</details>"


def table(rows: Iterable[tuple[str, Any]]) -> str:
  """Names and values, a row each."""
  lines = [
    f"<tr><td>{text(name)}</td><td><code>{text(spell(value))}</code></td></tr>"
    for name, value in rows
  ]
  return f"<table>{''.join(lines)}</table>"


def spell(value: Any) -> str:
  """A value of a JSON file in one line."""
  if isinstance(value, float):
    return f"{value:.6g}"
  return (
    value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  )
