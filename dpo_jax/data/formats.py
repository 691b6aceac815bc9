"""The shapes of preference data, how a row shows its own, one view of all.

A prompt and its responses are strings, or lists of chat messages
`{"role": ..., "content": ...}`; which of the two is the row's own choice.
"""

from dataclasses import dataclass
from typing import Any

from dpo_jax.data.sources import kind_of
from dpo_jax.errors import DataError

Message = dict[str, Any]
Text = str | list[Message]

# Format name: how a row of it looks. The text is what an error message shows.
FORMATS = {
  "paired": "prompt + chosen + rejected (strings)",
  "paired_messages": "prompt + chosen + rejected (lists of messages)",
  "paired_implicit": "chosen + rejected (whole dialogues, shared beginning)",
  "unpaired": "prompt + completion + label (strings, true or false)",
  "unpaired_messages": "messages + label, or prompt + completion + label",
  "completion": "prompt + completion, or messages",
}
PAIRED = ("paired", "paired_messages", "paired_implicit")
UNPAIRED = ("unpaired", "unpaired_messages")

HH_ANSWER = "\n\nAssistant:"
HH_TURNS = ("\n\nHuman:", HH_ANSWER)

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class RawExample:
  """One row: a prompt and one or two responses, best first.

  `desirable` is None unless the row carries a label.
  """

  prompt: Text
  responses: tuple[Text, ...]
  desirable: bool | None = None
  subset: str = ""


def detect_format(row: dict) -> str:
  """The name in `FORMATS` that the row's keys (and little else) show.

  Values are not judged: a null `prompt` is still a `paired` row, and
  `to_example` says what is wrong with it.

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
    return RawExample(prompt, (chosen, rejected), None, subset)
  desirable = _label(row) if fmt in UNPAIRED else None
  prompt, response = _single(row)
  return RawExample(prompt, (response,), desirable, subset)


def _pair(row: dict, fmt: str) -> tuple[Text, Text, Text]:
  if fmt == "paired_implicit":
    if isinstance(row["chosen"], list):
      return _split_messages(
        _messages(row, "chosen"), _messages(row, "rejected")
      )
    return split_hh(_string(row, "chosen"), _string(row, "rejected"))
  if fmt == "paired_messages":
    key = "prompt" if "prompt" in row else "conversations"
    answers = (_answer(row, "chosen"), _answer(row, "rejected"))
    return _messages(row, key), *answers
  if "prompt" in row:
    texts = (_string(row, key) for key in ("prompt", "chosen", "rejected"))
    return tuple(texts)
  answers = (" " + _string(row, key) for key in ("chosen", "rejected"))
  return _instruction_prompt(row), *answers


def _single(row: dict) -> tuple[Text, Text]:
  for key in ("messages", "conversations"):
    if key in row:
      messages = _answer(row, key)
      return messages[:-1], messages[-1:]
  if "prompt" not in row:
    return _instruction_prompt(row), " " + _string(row, "output")
  if isinstance(row["prompt"], list):
    return _messages(row, "prompt"), _answer(row, "completion")
  return _string(row, "prompt"), _string(row, "completion")


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
    _check_answer(response, key)
  return chosen[:shared], *responses


def _instruction_prompt(row: dict) -> str:
  text = f"Instruction: {_string(row, 'instruction')}\n"
  if row.get("input"):
    text += f"Input: {_string(row, 'input')}\n"
  return text + "Response:"


def _string(row: dict, key: str) -> str:
  value = row.get(key)
  if not isinstance(value, str):
    raise DataError(f"{key!r} must be a string, found {kind_of(value)}")
  return value


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


def _messages(row: dict, key: str) -> list[Message]:
  """A list of messages, ShareGPT's `from`/`value` turned into role/content."""
  value = row.get(key)
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list) or not value:
    found = "an empty list" if value == [] else kind_of(value)
    raise DataError(f"{key!r} must be a list of messages, found {found}")
  return [_message(one, f"{key}[{i}]") for i, one in enumerate(value)]


def _message(value: Any, place: str) -> Message:
  if not isinstance(value, dict):
    raise DataError(f"{place!r} must be a message, found {kind_of(value)}")
  # Columnar files write null where a message lacks a key that others have.
  message = {key: inner for key, inner in value.items() if inner is not None}
  if "role" not in message and "from" in message:
    role, content = message["from"], message.get("value")
    message = {"role": _SHAREGPT_ROLES.get(str(role), role), "content": content}
  for key in ("role", "content"):
    if not isinstance(message.get(key), str):
      found = kind_of(message.get(key))
      raise DataError(f"'{place}.{key}' must be a string, found {found}")
  return message


def _answer(row: dict, key: str) -> list[Message]:
  messages = _messages(row, key)
  _check_answer(messages, key)
  return messages


def _check_answer(messages: list[Message], key: str) -> None:
  role = messages[-1]["role"]
  if role != "assistant":
    raise DataError(
      f"{key!r} must end with a message of role 'assistant', found {role!r}"
    )
