"""Chat templates: messages to the text a model was trained on."""

import functools
from collections.abc import Sequence

import jinja2
from jinja2.sandbox import SecurityError

from dpo_jax.data.allowance import CHARACTERS
from dpo_jax.data.formats import common_prefix
from dpo_jax.data.sandbox import Refusal, Sandbox
from dpo_jax.errors import DataError

MAX_TEMPLATE = 1 << 18  # characters; the largest in common use have 20,000


class TemplateRefused(DataError):
  """The template turned down these messages; others may render."""


def render(
  template: str,
  messages: list[dict],
  special_tokens: dict[str, str],
  add_generation_prompt: bool,
) -> str:
  """Renders `messages` as transformers' `apply_chat_template` does.

  Args:
    template: Jinja source, untrusted.
    messages: `{"role": ..., "content": ...}`, plain JSON values only.
    special_tokens: name to text, `bos_token`, `eos_token` and so on.
    add_generation_prompt: end with the opening of an assistant turn.

  Raises:
    TemplateRefused: the template fails on these messages.
    DataError: it is no template, or does what no chat template needs (reaches
      for Python's internals, takes seconds, builds megabytes).
  """
  environment, compiled = _compile(template)
  size = len(template) + _characters(messages)
  limit = 16 * size + (64 << 10)
  environment.allowance.start(CHARACTERS + 64 * size)
  parts = []
  length = 0
  try:
    pieces = compiled.generate(
      messages=messages,
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **special_tokens,
    )
    for piece in pieces:
      parts.append(piece)
      length += len(piece)
      if length > limit:
        raise DataError(
          f"chat template: writes more than {limit} characters for {size}"
        )
  except (SecurityError, MemoryError, RecursionError) as error:
    raise _failure("does what no chat needs", error) from None
  except Refusal as error:
    raise TemplateRefused(f"chat template: {_line(error)}") from None
  except DataError:
    raise
  except Exception as error:
    reason = f"chat template fails: {_line(error)}"
    raise TemplateRefused(reason) from None
  return "".join(parts)


def prompt_and_wholes(
  template: str,
  prompt: list[dict],
  responses: Sequence[list[dict]],
  special_tokens: dict[str, str],
) -> tuple[list[str], bool]:
  """The prompt as its answers continue it, then the prompt with each answer.

  That is the rendering with an opening, except for templates that word a last
  turn in another way than one that was answered; then it is what the prompt
  with any answer begins with.

  Returns:
    The texts, and whether the opening had to be given up.
  """
  opening = render(template, prompt, special_tokens, True)
  wholes = [
    render(template, prompt + response, special_tokens, False)
    for response in responses
  ]
  if all(whole.startswith(opening) for whole in wholes):
    return [opening, *wholes], False
  any_two = [
    render(
      template,
      [*prompt, {"role": "assistant", "content": word}],
      special_tokens,
      False,
    )
    for word in ("a", "b")
  ]
  common = _beginning([*any_two, *wholes]).rstrip(" ")
  if len(common) >= len(_beginning([opening, *wholes])):
    opening = common
  return [opening, *wholes], True


def _beginning(texts: list[str]) -> str:
  """What all begin with."""
  first, last = min(texts), max(texts)
  return first[: common_prefix(first, last)]


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> tuple[Sandbox, jinja2.Template]:
  if len(template) > MAX_TEMPLATE:
    raise DataError(
      f"chat template: {len(template)} characters, at most {MAX_TEMPLATE}"
    )
  environment = Sandbox()
  try:
    return environment, environment.from_string(template)
  # Python refuses some of what Jinja generates, each in its own way.
  except Exception as error:
    raise _failure("cannot be compiled", error) from None


def _characters(value: object) -> int:
  if isinstance(value, str):
    return len(value)
  if isinstance(value, dict):
    return sum(map(_characters, value.values()))
  if isinstance(value, list):
    return sum(map(_characters, value))
  return 8


def _failure(what: str, error: Exception) -> DataError:
  return DataError(f"chat template {what}: {_line(error)}")


def _line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:300]
