"""Rows to token ids: a prompt and its responses, each cut and ended.

What is left of a row here is what training sees, so everything dropped or
changed on the way is counted under a name.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_jax.data import chat, formats, ranking
from dpo_jax.data.boundary import Drop, split_ids
from dpo_jax.data.encode_settings import KINDS, EncodeSettings
from dpo_jax.data.formats import RawExample
from dpo_jax.data.sources import Item
from dpo_jax.data.tokenizer import HFTokenizer, check_text
from dpo_jax.errors import DataError

CHUNK = 1000  # rows tokenised at a time


@dataclass
class Encoded:
  """Examples end to end: prompt, then the responses, best first.

  `lengths` has those of all responses, `counts` how many are an example's.
  `dropped` and `changed` count examples by reason; a row that cannot be read
  counts as one. `first_dropped` has the place of the first of each reason.
  """

  format: str = ""
  rows: int = 0
  tokens: array = field(default_factory=lambda: array("i"))
  prompt_lengths: array = field(default_factory=lambda: array("i"))
  lengths: array = field(default_factory=lambda: array("i"))
  counts: array = field(default_factory=lambda: array("i"))
  desirable: list[bool] = field(default_factory=list)
  margins: array = field(default_factory=lambda: array("f"))
  row_numbers: array = field(default_factory=lambda: array("q"))
  subsets: array = field(default_factory=lambda: array("i"))
  subset_names: dict[str, int] = field(default_factory=dict)
  dropped: Counter = field(default_factory=Counter)
  changed: Counter = field(default_factory=Counter)
  first_dropped: dict[str, str] = field(default_factory=dict)
  first_error: str = ""

  def __len__(self) -> int:
    return len(self.prompt_lengths)

  def extend(self, other: "Encoded") -> None:
    """Adds what came of the rows right behind, counted from there on."""
    for name in _ARRAYS:
      getattr(self, name).extend(getattr(other, name))
    names = self.subset_names
    number = [names.setdefault(x, len(names)) for x in other.subset_names]
    self.subsets.extend(number[i] for i in other.subsets)
    self.rows = other.rows
    self.dropped.update(other.dropped)
    self.changed.update(other.changed)
    for reason, where in other.first_dropped.items():
      self.first_dropped.setdefault(reason, where)
    self.first_error = self.first_error or other.first_error


_ARRAYS = (
  "tokens", "prompt_lengths", "lengths", "counts", "desirable", "margins",
  "row_numbers",
)  # fmt: skip


@dataclass(frozen=True)
class _Pending:
  """An example and the texts to tokenise: the prompt, then each whole."""

  where: str
  row: int
  texts: tuple[str, ...]
  desirable: bool
  margin: float
  subset: str
  notes: Counter


class Encoder:
  """Encodes rows, some at a time; `result` has what came of all."""

  def __init__(
    self,
    tokenizer: HFTokenizer,
    settings: EncodeSettings,
    *,
    fmt: str = "",
    rows: int = 0,
  ):
    """Args:
    tokenizer: of all texts.
    settings: how rows become examples.
    fmt: the shape of the rows, if that is known; else the first that can be
      used decides.
    rows: how many came before.
    """
    self.tokenizer = tokenizer
    self.settings = settings
    self.result = Encoded(fmt, rows)

  def encode(self, chunk: list[Item]) -> None:
    """Adds (place, row) items; an error in place of a row is a bad row.

    Raises:
      DataError: the rows' shape does not suit the kind, a row cannot be used
        and the settings say so, or the template or tokenizer cannot be used.
    """
    pending = []
    for where, row in chunk:
      pending.extend(self._prepare(where, row))
      self.result.rows += 1
    texts = [text for one in pending for text in one.texts]
    ids = iter(self.tokenizer.encode(texts))
    for one in pending:
      parts = list(itertools.islice(ids, len(one.texts)))
      try:
        self._add(
          one,
          *split_ids(
            parts,
            self.tokenizer,
            self.settings.max_length,
            self.settings.prompt_limit,
          ),
        )
      except Drop as drop:
        self._count(one.where, drop)

  def _prepare(self, where: str, row: dict | DataError) -> Iterator[_Pending]:
    try:
      example, notes = self._read(where, row), Counter()
      if self.result.format == "ranked" and self.settings.kind not in (
        "sft", "prompts"
      ):  # fmt: skip
        example, left_out = ranking.strict(example)
        # Of pairs, what lies between best and worst is left out anyhow.
        notes = left_out if self.settings.kind == "ranked" else notes
    except Drop as drop:
      self._count(where, drop)
      return
    for part in self._by_kind(example):
      try:
        texts, moved = self._texts(part)
      except Drop as drop:
        self._count(where, drop)
        continue
      except chat.TemplateRefused as error:
        self._count(where, Drop("template_refused", str(error)))
        continue
      except DataError as error:
        raise DataError(f"{where}: {error}") from None
      yield _Pending(
        where,
        self.result.rows,
        texts,
        part.desirable is not False,
        part.margin,
        part.subset,
        notes
        | Counter(
          extra_turns=int(_has_extra_turns(part)), opening_left_out=int(moved)
        ),
      )

  def _read(self, where: str, row: dict | DataError) -> RawExample:
    if isinstance(row, DataError):
      raise Drop("bad_line", str(row).removeprefix(f"{where}: "))
    try:
      fmt = formats.detect_format(row, self.settings.kind == "prompts")
    except DataError as error:
      raise Drop("wrong_shape", str(error)) from None
    if self.result.format and fmt != self.result.format:
      raise Drop(
        "wrong_shape",
        f"a row of shape {fmt!r} in a source of shape {self.result.format!r}",
      )
    try:
      example = formats.to_example(row, fmt)
    except DataError as error:
      raise Drop("bad_value", str(error)) from None
    try:
      _check_example(example)
    except DataError as error:
      raise Drop("bad_text", str(error)) from None
    if not self.result.format:  # decided by a row that can be used
      self._accept(where, fmt)
    return example

  def _accept(self, where: str, fmt: str) -> None:
    kind = self.settings.kind
    if fmt not in KINDS[kind]:
      raise DataError(
        f"{where}: kind {kind!r} takes {', '.join(KINDS[kind])}; found {fmt}"
        f" ({formats.FORMATS[fmt]})"
      )
    self.result.format = fmt

  def _by_kind(self, example: RawExample) -> Iterator[RawExample]:
    kind, responses = self.settings.kind, example.responses
    if kind == "prompts":
      yield replace(example, responses=())
    elif kind == "sft" and example.desirable is False:
      self.result.dropped["undesirable_skipped"] += 1
    elif kind == "sft":
      yield replace(example, responses=responses[:1])
    elif kind == "paired":
      yield replace(example, responses=(responses[0], responses[-1]))
    elif kind == "unpaired" and len(responses) == 2:
      same = responses[0] == responses[1]
      for response, desirable in zip(responses, (True, False)):
        # Both sides of an equal pair would say the opposite of each other.
        part = responses if same else (response,)
        yield replace(example, responses=part, desirable=desirable)
    else:
      yield example

  def _texts(self, example: RawExample) -> tuple[tuple[str, ...], bool]:
    """The prompt, then each whole; whether the opening was given up."""
    responses = example.responses
    for response in responses:
      if not _content(response).strip():
        raise Drop("empty_response", "an answer without text")
    if len(responses) == 2 and responses[0] == responses[1]:
      raise Drop("identical_responses", "chosen equals rejected")
    prompt = example.prompt
    if isinstance(prompt, str):
      return (prompt, *(prompt + response for response in responses)), False
    template = self.tokenizer.chat_template
    if template is None:
      raise DataError(
        "a row of messages, and the tokenizer has no chat template"
      )
    special = self.tokenizer.special_tokens
    if not prompt:
      raise Drop("empty_prompt", "no message before the answer")
    texts, moved = chat.prompt_and_wholes(template, prompt, responses, special)
    return tuple(texts), moved

  def _add(
    self,
    one: _Pending,
    prompt: list[int],
    responses: list[list[int]],
    notes: Counter,
  ) -> None:
    result = self.result
    result.changed.update(one.notes | notes)
    for ids in (prompt, *responses):
      result.tokens.extend(ids)
    result.prompt_lengths.append(len(prompt))
    result.lengths.extend(map(len, responses))
    result.counts.append(len(responses))
    result.desirable.append(one.desirable)
    result.margins.append(one.margin)
    result.row_numbers.append(one.row)
    names = result.subset_names
    result.subsets.append(names.setdefault(one.subset, len(names)))

  def _count(self, where: str, drop: Drop) -> None:
    sentence = f"{where}: {drop} ({drop.reason})"
    if self.settings.on_bad_row == "error":
      raise DataError(sentence)
    self.result.dropped[drop.reason] += 1
    self.result.first_dropped.setdefault(drop.reason, where)
    self.result.first_error = self.result.first_error or sentence


def _has_extra_turns(example: RawExample) -> bool:
  """Whether an HH response goes on with further turns of the dialogue."""
  prompt = example.prompt
  if not (isinstance(prompt, str) and prompt.endswith(formats.HH_ANSWER)):
    return False
  marks = itertools.product(formats.HH_TURNS, example.responses)
  return any(mark in response for mark, response in marks)


def _content(text: formats.Text) -> str:
  if isinstance(text, str):
    return text
  return "".join(message["content"] for message in text)


def _check_example(example: RawExample) -> None:
  for i, text in enumerate((example.prompt, *example.responses)):
    for part in [text] if isinstance(text, str) else map(_all_text, text):
      check_text(part, f"response {i}" if i else "prompt")


def _all_text(value: Any) -> str:
  """Every string inside a message, end to end."""
  if isinstance(value, str):
    return value
  if isinstance(value, dict):
    value = [*value, *value.values()]
  return "".join(map(_all_text, value)) if isinstance(value, list) else ""
