"""The shapes of preference data, how a row shows its own, one view of all.

A prompt and its responses are strings, or lists of chat messages
`{"role": ..., "content": ...}`; which of the two is the row's own choice.
"""

from dataclasses import dataclass
from typing import Any

from dpo_jax.data import values
from dpo_jax.data.sources import kind_of
from dpo_jax.data.values import Message
from dpo_jax.errors import DataError

Text = str | list[Message]

# Format name: how a row of it looks. The text is what an error message shows.
FORMATS = {
  "paired": "prompt + chosen + rejected (strings)",
  "paired_messages": "prompt + chosen + rejected (lists of messages)",
  "paired_implicit": "chosen + rejected (whole dialogues, shared beginning)",
  "unpaired": "prompt + completion + label (strings, true or false)",
  "unpaired_messages": "messages + label, or prompt + completion + label",
  "completion": "prompt + completion, or messages",
  "ranked": "prompt + responses (a list, best first, or in any order + scores)",
}
# Of a row without an answer, which counts only where none is asked for.
PROMPT = "prompt"
PAIRED = ("paired", "paired_messages", "paired_implicit")
UNPAIRED = ("unpaired", "unpaired_messages")

_RANKED_KEYS = ("responses", "completions")

HH_ANSWER = "\n\nAssistant:"
HH_TURNS = ("\n\nHuman:", HH_ANSWER)


@dataclass(frozen=True)
class RawExample:
  """One row: a prompt and its responses, best first.

  `desirable` is None unless the row carries a label. `scores` is empty, or has
  the score of each response. `margin` is by how much the first of a pair is
  better, 0 where the row does not say.
  """

  prompt: Text
  responses: tuple[Text, ...]
  desirable: bool | None = None
  subset: str = ""
  scores: tuple[float, ...] = ()
  margin: float = 0.0


def detect_format(row: dict, bare: bool = False) -> str:
  """The name in `FORMATS` that the row's keys (and little else) show.

  Values are not judged: a null `prompt` is still a `paired` row, and
  `to_example` says what is wrong with it.

  Args:
    row: as read.
    bare: whether a row of a prompt alone will do, which is called `PROMPT`.

  Raises:
    DataError: no shape fits; lists the accepted ones and the keys found.
  """
  prompt = row.get("prompt")
  if "chosen" in row and "rejected" in row:
    if "conversations" in row or isinstance(prompt, list):
      return "paired_messages"
    if "instruction" in row:
      return "paired"
    # Some sets repeat the first message as `prompt` beside whole dialogues.
    whole = "prompt" not in row or isinstance(row["chosen"], list)
    return "paired_implicit" if whole else "paired"
  chat = "messages" in row or "conversations" in row
  if chat or ("prompt" in row and "completion" in row):
    if "label" not in row:
      return "completion"
    return (
      "unpaired_messages" if chat or isinstance(prompt, list) else "unpaired"
    )
  if "instruction" in row and "output" in row:
    return "completion"
  asked = "prompt" in row or "instruction" in row
  if asked and any(key in row for key in _RANKED_KEYS):
    return "ranked"
  if asked and bare:
    return PROMPT
  keys = ", ".join(map(str, row)) or "none"
  shapes = "; ".join(FORMATS.values())
  raise DataError(
    f"no known shape; expected {shapes}; found keys: {keys[:200]}"
  )


def to_example(row: dict, fmt: str) -> RawExample:
  """Converts a row whose `detect_format` is `fmt`.

  Raises:
    DataError: a value has the wrong type or is missing; names the key.
  """
  subset = _subset(row)
  if fmt in PAIRED:
    prompt, chosen, rejected = _pair(row, fmt)
    responses, margin = (chosen, rejected), values.margin(row, "margin")
    return RawExample(prompt, responses, None, subset, margin=margin)
  if fmt == "ranked":
    prompt, responses, scores = _ranking(row)
    return RawExample(prompt, responses, None, subset, scores)
  if fmt == PROMPT:
    return RawExample(_prompt(row), (), None, subset)
  desirable = _label(row) if fmt in UNPAIRED else None
  prompt, response = _single(row)
  return RawExample(prompt, (response,), desirable, subset)


def _pair(row: dict, fmt: str) -> tuple[Text, Text, Text]:
  if fmt == "paired_implicit":
    if isinstance(row["chosen"], list):
      return _split_messages(
        values.messages(row, "chosen"), values.messages(row, "rejected")
      )
    return split_hh(
      values.string(row, "chosen"), values.string(row, "rejected")
    )
  if fmt == "paired_messages":
    key = "prompt" if "prompt" in row else "conversations"
    answers = (values.answer(row, "chosen"), values.answer(row, "rejected"))
    return values.messages(row, key), *answers
  if "prompt" in row:
    texts = (
      values.string(row, key) for key in ("prompt", "chosen", "rejected")
    )
    return tuple(texts)
  answers = (" " + values.string(row, key) for key in ("chosen", "rejected"))
  return _instruction_prompt(row), *answers


def _single(row: dict) -> tuple[Text, Text]:
  for key in ("messages", "conversations"):
    if key in row:
      messages = values.answer(row, key)
      return messages[:-1], messages[-1:]
  if "prompt" not in row:
    return _instruction_prompt(row), " " + values.string(row, "output")
  if isinstance(row["prompt"], list):
    return values.messages(row, "prompt"), values.answer(row, "completion")
  return values.string(row, "prompt"), values.string(row, "completion")


def _prompt(row: dict) -> Text:
  if "prompt" not in row:
    return _instruction_prompt(row)
  if isinstance(row["prompt"], list):
    return values.messages(row, "prompt")
  return values.string(row, "prompt")


def _ranking(row: dict) -> tuple[Text, tuple[Text, ...], tuple[float, ...]]:
  key = next(key for key in _RANKED_KEYS if key in row)
  if not isinstance(row[key], list):
    raise DataError(
      f"{key!r} must be a list of responses, found {kind_of(row[key])}"
    )
  count = len(row[key])
  if count < 2:
    raise DataError(f"{key!r} must have at least 2 responses, found {count}")
  listed = {f"{key}[{i}]": one for i, one in enumerate(row[key])}
  if "prompt" not in row:
    prompt = _instruction_prompt(row)
    responses = [" " + values.string(listed, place) for place in listed]
  elif isinstance(row["prompt"], list):
    prompt = values.messages(row, "prompt")
    responses = [values.answer(listed, place) for place in listed]
  else:
    prompt = values.string(row, "prompt")
    responses = [values.string(listed, place) for place in listed]
  if row.get("scores") is None:
    return prompt, tuple(responses), ()
  scores = values.numbers(row, "scores", count)
  order = sorted(range(count), key=lambda i: -scores[i])
  return (
    prompt,
    tuple(responses[i] for i in order),
    tuple(scores[i] for i in order),
  )


def split_hh(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Splits two transcripts after the last answer mark that they share.

  Returns prompt (ends with "\\n\\nAssistant:"), chosen and rejected.
  """
  shared = common_prefix(chosen, rejected)
  mark = chosen.rfind(HH_ANSWER, 0, shared)
  if mark < 0:
    raise DataError(
      f"chosen and rejected share no beginning that holds {HH_ANSWER!r}"
    )
  end = mark + len(HH_ANSWER)
  return chosen[:end], chosen[end:], rejected[end:]


def common_prefix(a: Any, b: Any) -> int:
  """Length of the shared beginning of two sequences, by halving."""
  low, high = 0, min(len(a), len(b))
  while low < high:
    middle = (low + high + 1) // 2
    if a[low:middle] == b[low:middle]:
      low = middle
    else:
      high = middle - 1
  return low


def _split_messages(chosen: list[Message], rejected: list[Message]) -> Any:
  # Each keeps at least its last message, so that equal dialogues are seen as
  # equal responses and not as an error in the row.
  shared = min(
    common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1
  )
  if shared == 0:
    raise DataError("chosen and rejected share no first message")
  responses = chosen[shared:], rejected[shared:]
  for key, response in zip(("chosen", "rejected"), responses):
    values.check_answer(response, key)
  return chosen[:shared], *responses


def _instruction_prompt(row: dict) -> str:
  text = f"Instruction: {values.string(row, 'instruction')}\n"
  if row.get("input"):
    text += f"Input: {values.string(row, 'input')}\n"
  return text + "Response:"


def _label(row: dict) -> bool:
  label = row["label"]
  if not (isinstance(label, int) and label in (0, 1)):
    shown = repr(label) if isinstance(label, int) else kind_of(label)
    raise DataError(f"'label' must be true, false, 1 or 0, found {shown[:40]}")
  return bool(label)


def _subset(row: dict) -> str:
  subset = row.get("subset")
  if subset is None:
    return ""
  if not isinstance(subset, str):
    raise DataError(f"'subset' must be a string, found {kind_of(subset)}")
  return subset
