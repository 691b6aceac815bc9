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
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_jax.data import sandbox_syntax as syntax
from dpo_jax.data.allowance import Allowance, LimitError

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


class Refusal(jinja2.TemplateError):
  """The template itself called `raise_exception`."""


class Sandbox(ImmutableSandboxedEnvironment):
  """The environment chat templates expect, with an allowance per rendering.

  Call `allowance.start` before each.
  """

  intercepted_binops = frozenset(["+", "*", "**", "%"])

  def __init__(self) -> None:
    self.allowance = Allowance()
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[loopcontrols, syntax.Generation],
      finalize=self.allowance.text,
    )
    self.globals.pop("lipsum")
    self.globals["raise_exception"] = _raise_exception
    self.globals["strftime_now"] = _strftime_now
    self.filters = {name: FILTERS[name] for name in _FILTERS.split(" ")}
    for name in _TEXT_FILTERS.split(" "):
      self.filters[name] = self._of_text(FILTERS[name])
    self.filters |= {
      "format": self._format,
      "indent": self._indent,
      "join": self._join,
      "replace": self._replace,
      "round": self._round,
      "string": self.allowance.text,
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

  def call_binop(self, context: Any, op: str, left: Any, right: Any) -> Any:
    self.allowance.operator(op, left, right)
    return super().call_binop(context, op, left, right)

  def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if isinstance(owner, str) and name == "replace":
      self.allowance.replace(owner, *args)
    elif isinstance(owner, str) and name == "join":
      args = (list(args[0]), *args[1:])
      self.allowance.join(args[0], owner)
    # ImmutableSandboxedEnvironment.call takes its own name for self.
    result = super().call(context, function, *args, **kwargs)
    self.allowance.charge(self.allowance.weight(result) + 1)
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
      self.allowance.format(template, [*args, *kwargs.values()])
      return wrapped(*args, **kwargs)

    return format_checked

  def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
    return syntax.Rewrite().visit(super()._parse(source, name, filename))

  def _charged(self, function: Any) -> Any:
    @functools.wraps(function)  # keeps Jinja's mark of what to pass first
    def charged(*args: Any, **kwargs: Any) -> Any:
      result = function(*args, **kwargs)
      self.allowance.charge(self.allowance.weight(result) + 1)
      return result

    return charged

  def _of_text(self, function: Any) -> Any:
    @functools.wraps(function)
    def of_text(*args: Any, **kwargs: Any) -> Any:
      return function(*map(self.allowance.text, args), **kwargs)

    return of_text

  def _concat(self, values: list) -> str:
    # Text is charged where it is made; a value's text is made here.
    parts = [str(self.allowance.text(value)) for value in values]
    return "".join(parts)

  @jinja2.pass_context
  def _literal(self, _: Any, text: str) -> str:
    return text

  @jinja2.pass_context
  def _turns(self, _: Any, items: Any) -> Any:
    for item in items:
      self.allowance.charge(1)
      yield item

  def _join(self, items: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
      items = map(make_attrgetter(self, attribute), items)
    items = list(items)
    self.allowance.join(items, d)
    return d.join(str(item) for item in items)

  def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(self.allowance.text(text))
    self.allowance.replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)

  def _format(self, template: Any, *args: Any, **kwargs: Any) -> str:
    template = str(self.allowance.text(template))
    self.allowance.format(template, [*args, *kwargs.values()])
    return FILTERS["format"](template, *args, **kwargs)

  def _indent(
    self,
    text: str,
    width: int | str = 4,
    first: bool = False,
    blank: bool = False,
  ) -> str:
    wide = len(width) if isinstance(width, str) else width
    self.allowance.charge((text.count("\n") + 1) * wide + len(text))
    return FILTERS["indent"](text, width, first, blank)

  def _compared(self, value: Any) -> Any:
    # Comparing lists that hold each other twice over takes for ever.
    if isinstance(value, (list, tuple, dict)):
      self.allowance.size(value)
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
    self.allowance.charge(self.allowance.size(value) * (1 + (indent or 0)))
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
  Allowance().format(form)
  return datetime.now().strftime(form)
