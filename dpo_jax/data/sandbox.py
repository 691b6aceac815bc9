"""A Jinja environment that bounds what a template from a stranger can cost.

Jinja's immutable sandbox keeps a template from reaching Python's internals. It
does not keep it from asking for `'a' * 10**10` or from looping for a year.
Here every rendering has an allowance of characters it may build and of seconds
it may take. Operators, calls and filters are counted where Jinja lets them be;
`~`, slices, comparisons, literal text and the turns of loops are sent through
counting filters by a rewrite of the parsed template. Filters and methods whose
cost is not bounded by what they are given are absent.
"""

import functools
import json
import re
import time
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
ALLOWANCE = 1 << 25

# Filters whose result is about as large as what they are given.
_FILTERS = (
  "abs attr count d default dictsort first float groupby int items last "
  "length list map max min reject rejectattr reverse safe select selectattr "
  "sort unique"
)
# The same of those that turn what they are given into text first.
_TEXT_FILTERS = (
  "capitalize e escape forceescape lower title trim upper wordcount"
)
# Methods whose result is not bounded by what they are given.
_UNSAFE_METHODS = (
  "center",
  "expandtabs",
  "format_map",
  "ljust",
  "rjust",
  "to_bytes",
  "translate",
  "zfill",
)
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")


class LimitError(SecurityError):
  """The template asked for more time or memory than a chat needs."""


class Refusal(jinja2.TemplateError):
  """The template itself called `raise_exception`."""


class Sandbox(ImmutableSandboxedEnvironment):
  """The environment chat templates expect, with an allowance per rendering.

  Call `start(allowance)` before each rendering.
  """

  intercepted_binops = frozenset(["+", "*", "**", "%"])

  def __init__(self) -> None:
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[loopcontrols, _Generation],
      finalize=self.text,
    )
    self.start(ALLOWANCE)
    self.globals.pop("lipsum")
    self.globals["raise_exception"] = _raise_exception
    self.globals["strftime_now"] = _strftime_now
    self.filters = {name: FILTERS[name] for name in _FILTERS.split(" ")}
    for name in _TEXT_FILTERS.split(" "):
      self.filters[name] = self._of_text(FILTERS[name])
    self.filters |= {
      "indent": self._indent,
      "join": self._join,
      "replace": self._replace,
      "round": self._round,
      "string": self.text,
      "sum": self._sum,
      "tojson": self._tojson,
    }
    self.filters = {
      name: self._charged(function) for name, function in self.filters.items()
    }
    # Names the rewritten tree uses.
    self.filters |= {
      " compared": self._compared,
      " concat": self._concat,
      " literal": self._literal,
      " slice": self._charged(lambda value: value),
      " turns": self._turns,
    }

  def start(self, allowance: int) -> None:
    self.left = allowance
    self.deadline = time.monotonic() + SECONDS

  def charge(self, amount: int) -> None:
    """Takes `amount` characters (or an eighth as many items) off."""
    self.left -= amount
    if self.left < 0:
      raise LimitError("it builds too much text")
    if time.monotonic() > self.deadline:
      raise LimitError(f"it takes more than {SECONDS:g} seconds")

  def size(self, value: Any) -> int:
    """About how many characters `str(value)` has; charges for the look."""
    if isinstance(value, str):
      return len(value)
    if isinstance(value, dict):
      value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
      self.charge(32 * len(value) + 8)
      return sum(self.size(inner) + 4 for inner in value)
    return 20

  def text(self, value: Any) -> Any:
    """`str(value)`, paid for; markers such as Undefined stay themselves."""
    if not isinstance(value, (list, tuple, dict, set, frozenset, str)):
      return value
    self.charge(self.size(value))
    return value if isinstance(value, str) else str(value)

  def call_binop(self, context: Any, op: str, left: Any, right: Any) -> Any:
    if op == "%" and isinstance(left, str):
      self._check_format(left, right if isinstance(right, tuple) else [right])
    elif op == "+" and hasattr(left, "__len__"):
      self.charge(self._weight(left) + self._weight(right))
    elif op == "*":
      for one, times in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(times, int):
          self.charge(self._weight(one) * max(times, 0))
      self._check_bits(left, right, lambda a, b: a + b)
    elif op == "**":
      self._check_bits(left, right, lambda a, b: a * right)
    return super().call_binop(context, op, left, right)

  def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if isinstance(owner, str) and name == "replace":
      self._pay_replace(owner, *args[:2])
    elif isinstance(owner, str) and name == "join":
      args = (list(args[0]), *args[1:])
      self._pay_join(args[0], owner)
    # ImmutableSandboxedEnvironment.call takes its own name for self.
    result = super().call(context, function, *args, **kwargs)
    self.charge(self._weight(result) + 1)
    return result

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    if attr in _UNSAFE_METHODS:
      return False
    return super().is_safe_attribute(obj, attr, value)

  def wrap_str_format(self, value: Any) -> Any:
    wrapped = super().wrap_str_format(value)
    if wrapped is None:
      return None
    template = value.__self__

    def format_checked(*args: Any, **kwargs: Any) -> str:
      self._check_format(template, [*args, *kwargs.values()])
      return wrapped(*args, **kwargs)

    return format_checked

  def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
    return _Rewrite().visit(super()._parse(source, name, filename))

  def _weight(self, value: Any) -> int:
    if isinstance(value, str):
      return len(value)
    return 8 * len(value) if hasattr(value, "__len__") else 0

  def _check_bits(self, left: Any, right: Any, bits: Any) -> None:
    numbers = isinstance(left, int) and isinstance(right, int)
    if numbers and bits(left.bit_length(), right.bit_length()) > 4096:
      raise LimitError("it builds too large a number")

  def _check_format(self, template: str, args: Any) -> None:
    if _WIDE.search(template):
      raise LimitError("a format asks for too wide a field")
    largest = max((self.size(arg) for arg in args), default=0)
    fields = template.count("{") + template.count("%")
    self.charge(fields * (largest + 1000) + len(template))

  def _pay_replace(self, text: str, old: str = "", new: str = "") -> None:
    self.charge(len(text) + text.count(str(old)) * len(str(new)))

  def _pay_join(self, items: list, between: str) -> None:
    self.charge(self.size(items) + len(items) * len(between))

  def _charged(self, function: Any) -> Any:
    @functools.wraps(function)  # keeps Jinja's mark of what to pass first
    def charged(*args: Any, **kwargs: Any) -> Any:
      result = function(*args, **kwargs)
      self.charge(self._weight(result) + 1)
      return result

    return charged

  def _of_text(self, function: Any) -> Any:
    @functools.wraps(function)
    def of_text(*args: Any, **kwargs: Any) -> Any:
      return function(*map(self.text, args), **kwargs)

    return of_text

  def _concat(self, values: list) -> str:
    # Text is charged where it is made; a value's text is made here.
    parts = [str(self.text(value)) for value in values]
    return "".join(parts)

  @jinja2.pass_context
  def _literal(self, _: Any, text: str) -> str:
    return text

  @jinja2.pass_context
  def _turns(self, _: Any, items: Any) -> Any:
    for item in items:
      self.charge(1)
      yield item

  def _join(self, items: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
      items = map(make_attrgetter(self, attribute), items)
    items = list(items)
    self._pay_join(items, d)
    return d.join(str(item) for item in items)

  def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(self.text(text))
    self._pay_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)

  def _indent(
    self,
    text: str,
    width: int | str = 4,
    first: bool = False,
    blank: bool = False,
  ) -> str:
    wide = len(width) if isinstance(width, str) else width
    self.charge((text.count("\n") + 1) * wide + len(text))
    return FILTERS["indent"](text, width, first, blank)

  def _compared(self, value: Any) -> Any:
    # Comparing lists that hold each other twice over takes for ever.
    if isinstance(value, (list, tuple, dict)):
      self.size(value)
    return value

  def _round(self, value: float, precision: int = 0, method: str = "common"):
    if abs(precision) > 100:
      raise LimitError("it rounds too far")
    return FILTERS["round"](value, precision, method)

  def _sum(self, items: Any, attribute: Any = None, start: float = 0) -> Any:
    if attribute is not None:
      items = map(make_attrgetter(self, attribute), items)
    if not isinstance(start, (int, float)):
      raise LimitError("sum adds numbers only")
    return sum(items, start)

  def _tojson(
    self,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
  ) -> str:
    # Jinja's own escapes HTML characters, which models never saw.
    if isinstance(indent, int) and indent > 16:
      raise LimitError("tojson indents too far")
    self.charge(self.size(value) * (1 + (indent or 0)))
    return json.dumps(
      value,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
  raise Refusal(message)


def _strftime_now(form: str) -> str:
  if len(form) > 200 or _WIDE.search(form):
    raise LimitError("strftime_now asks for too wide a field")
  return datetime.now().strftime(form)


class _Generation(Extension):
  """Accepts `{% generation %}`, which marks the text a model wrote."""

  tags = frozenset(["generation"])

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


class _Rewrite(NodeTransformer):
  """Sends what no other hook sees through filters that can count."""

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
    self.generic_visit(node)
    return _filter(nodes.List(node.nodes, lineno=node.lineno), " concat")

  def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
    return _filter(nodes.Const(node.data, lineno=node.lineno), " literal")

  def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
    self.generic_visit(node)
    return _filter(node, " slice") if type(node.arg) is nodes.Slice else node

  def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
    self.generic_visit(node)
    for side in (node, *node.ops):
      if not isinstance(side.expr, nodes.Const):
        side.expr = _filter(side.expr, " compared")
    return node

  def visit_For(self, node: nodes.For) -> nodes.Node:
    self.generic_visit(node)
    node.iter = _filter(node.iter, " turns")
    return node


def _filter(value: nodes.Expr, name: str) -> nodes.Filter:
  return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
