"""What one rendering of a template may cost: characters built, seconds taken.

Each method is called before the work it pays for, so that what would not fit
is never begun.
"""

import re
import time
from collections.abc import Iterable
from typing import Any

from jinja2.sandbox import SecurityError

SECONDS = 5.0
CHARACTERS = 1 << 25

_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")


class LimitError(SecurityError):
  """The template asked for more time or memory than a chat needs."""


class Allowance:
  """Counts down from `start`; raises LimitError when nothing is left."""

  def __init__(self) -> None:
    self.start(CHARACTERS)

  def start(self, characters: int) -> None:
    self._left = characters
    self._deadline = time.monotonic() + SECONDS

  def charge(self, characters: int) -> None:
    self._left -= characters
    if self._left < 0:
      raise LimitError("it builds too much text")
    if time.monotonic() > self._deadline:
      raise LimitError(f"it takes more than {SECONDS:g} seconds")

  def weight(self, value: Any) -> int:
    """What `value` itself takes up, in characters, not what it refers to."""
    if isinstance(value, str):
      return len(value)
    return 8 * len(value) if hasattr(value, "__len__") else 0

  def size(self, value: Any) -> int:
    """About how many characters `str(value)` has; charges for the look.

    A list that holds one other twice, sixty levels deep, ends here.
    """
    if isinstance(value, str):
      return len(value)
    if isinstance(value, dict):
      value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
      self.charge(32 * len(value) + 8)
      return sum(self.size(inner) + 4 for inner in value)
    return 20

  def text(self, value: Any) -> Any:
    """`str(value)`; small things such as Undefined stay themselves."""
    if not isinstance(value, (list, tuple, dict, set, frozenset, str)):
      return value
    self.charge(self.size(value))
    return value if isinstance(value, str) else str(value)

  def operator(self, op: str, left: Any, right: Any) -> None:
    if op == "%" and isinstance(left, str):
      self.format(left, right if isinstance(right, tuple) else [right])
    elif op == "+" and hasattr(left, "__len__"):
      self.charge(self.weight(left) + self.weight(right))
    elif op == "*":
      for one, times in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(times, int):
          self.charge(self.weight(one) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int) and op in ("*", "**"):
      bits = left.bit_length()
      bits = bits * right if op == "**" else bits + right.bit_length()
      if bits > 4096:
        raise LimitError("it builds too large a number")

  def format(self, template: str, args: Iterable[Any] = ()) -> None:
    if _WIDE.search(template):
      raise LimitError("a format asks for too wide a field")
    largest = max(map(self.size, args), default=0)
    fields = template.count("{") + template.count("%")
    self.charge(fields * (largest + 1000) + len(template))

  def replace(self, text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    self.charge(len(text) + text.count(str(old)) * len(str(new)))

  def join(self, items: list, between: str) -> None:
    self.charge(self.size(items) + len(items) * len(between))
