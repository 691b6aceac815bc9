"""Values of a row by their key, or one sentence on what is wrong with them."""

import math
from typing import Any

from dpo_jax.data.sources import kind_of
from dpo_jax.errors import DataError

Message = dict[str, Any]

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def string(row: dict, key: str) -> str:
  """A string. Raises DataError for anything else."""
  value = row.get(key)
  if not isinstance(value, str):
    raise DataError(f"{key!r} must be a string, found {kind_of(value)}")
  return value


def numbers(row: dict, key: str, count: int) -> list[float]:
  """A list of `count` finite numbers. Raises DataError for anything else."""
  value = row.get(key)
  if not isinstance(value, list):
    raise DataError(
      f"{key!r} must be a list of numbers, found {kind_of(value)}"
    )
  if len(value) != count:
    raise DataError(f"{key!r} must have {count} numbers, found {len(value)}")
  return [_number(one, f"{key}[{i}]") for i, one in enumerate(value)]


def margin(row: dict, key: str) -> float:
  """A number of nats, not negative; 0 where the row has none. Raises DataError
  for anything else."""
  if row.get(key) is None:
    return 0.0
  value = _number(row[key], key)
  if not 0 <= value <= 1e6:
    raise DataError(f"{key!r} must be from 0 to 1e6, found {str(value)[:20]}")
  return float(value)


def _number(value: Any, place: str) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise DataError(f"'{place}' must be a number, found {kind_of(value)}")
  if isinstance(value, float) and not math.isfinite(value):
    raise DataError(f"'{place}' must be a finite number, found {value}")
  return value


def messages(row: dict, key: str) -> list[Message]:
  """A list of messages, ShareGPT's `from`/`value` turned into role/content; a
  message alone is a list of one.

  Raises:
    DataError: anything else, or a message without a role or content.
  """
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
  if isinstance(message.get("content"), list):
    parts = enumerate(message["content"])
    texts = [_part(one, f"{place}.content[{i}]") for i, one in parts]
    message["content"] = "".join(texts)
  for key in ("role", "content"):
    if not isinstance(message.get(key), str):
      found = kind_of(message.get(key))
      raise DataError(f"'{place}.{key}' must be a string, found {found}")
  return message


def _part(value: Any, place: str) -> str:
  """The text of one part of a message that has several."""
  kind = value.get("type", "text") if isinstance(value, dict) else None
  if kind != "text":
    found = kind_of(value) if kind is None else f"{kind!r}"
    raise DataError(f"{place!r} must be a part of type 'text', found {found}")
  if not isinstance(value.get("text"), str):
    found = kind_of(value.get("text"))
    raise DataError(f"'{place}.text' must be a string, found {found}")
  return value["text"]


def answer(row: dict, key: str) -> list[Message]:
  """Messages that end with the assistant's. Raises DataError for others."""
  found = messages(row, key)
  check_answer(found, key)
  return found


def check_answer(found: list[Message], key: str) -> None:
  """Raises DataError unless the last message is the assistant's."""
  role = found[-1]["role"]
  if role != "assistant":
    raise DataError(
      f"{key!r} must end with a message of role 'assistant', found {role!r}"
    )
