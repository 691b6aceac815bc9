"""Two sets of tensor names, told apart in one line that a person can read."""

import difflib
import re
from collections.abc import Iterable

_SHOWN = 6  # patterns of each side
_COMPARED = 200  # patterns to look for what was meant
_LONGEST = 120  # characters of a pattern; names come from files


def differences(missing: Iterable[str], unexpected: Iterable[str]) -> str:
  """Says what is missing and what is not expected, numbers as ranges.

  >>> differences(["model.layers.0.norm", "model.layers.1.norm"], ["b"])
  'missing: model.layers.{0-1}.norm (2); unexpected: b'
  """
  missing, unexpected = _patterns(missing), _patterns(unexpected)
  among = [key for key in list(unexpected)[:_COMPARED] if len(key) < _LONGEST]
  close = {}
  for key in list(missing)[:_SHOWN]:
    found = difflib.get_close_matches(key, among, n=1, cutoff=0.75)
    if found:
      close[key] = f" (did you mean {unexpected[found[0]]}?)"
  return (
    f"missing: {_list(missing, close)}; unexpected: {_list(unexpected, {})}"
  )


def _patterns(names: Iterable[str]) -> dict[str, str]:
  """Each name with its numbers left out -> how all names like it are shown."""
  groups: dict[str, list[list[int]]] = {}
  for name in sorted(names):
    numbers = [int(n) for n in re.findall(r"(?<=\.)[0-9]{1,9}(?=\.)", name)]
    pattern = re.sub(r"(?<=\.)[0-9]{1,9}(?=\.)", "{}", name)
    groups.setdefault(pattern, []).append(numbers)
  return {pattern: _show(pattern, rows) for pattern, rows in groups.items()}


def _show(pattern: str, rows: list[list[int]]) -> str:
  text = pattern.encode("unicode_escape").decode()
  if len(text) > _LONGEST:
    text = text[:_LONGEST] + "..."
  columns = [_ranges(set(column)) for column in zip(*rows)]
  for column in columns:
    text = text.replace("{}", column, 1)
  return text + (f" ({len(rows)})" if len(rows) > 1 else "")


def _ranges(numbers: set[int]) -> str:
  """{0, 1, 2, 5} -> "{0-2,5}"; a single number stands alone."""
  if len(numbers) == 1:
    return str(*numbers)
  runs: list[list[int]] = []
  for n in sorted(numbers):
    if runs and n == runs[-1][1] + 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  shown = [f"{a}-{b}" if a < b else str(a) for a, b in runs[:_SHOWN]]
  return "{" + ",".join(shown + ["..."] * (len(runs) > _SHOWN)) + "}"


def _list(patterns: dict[str, str], notes: dict[str, str]) -> str:
  shown = [
    text + notes.get(key, "") for key, text in list(patterns.items())[:_SHOWN]
  ]
  more = len(patterns) - len(shown)
  return (", ".join(shown) or "none") + (f" and {more} more" if more else "")
