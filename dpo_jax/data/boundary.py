"""Where a prompt ends and a response begins, in token ids.

A prompt and its response are tokenised together, because merges cross the
boundary, and split where the prompt alone and the joint texts part.
"""

from collections import Counter
from collections.abc import Sequence

from dpo_jax.data.formats import common_prefix
from dpo_jax.data.tokenizer import HFTokenizer


class Drop(Exception):
  """An example that cannot be used: a counted reason, and a sentence."""

  def __init__(self, reason: str, sentence: str):
    super().__init__(sentence)
    self.reason = reason


def distinct(items: Sequence) -> list[int]:
  """Indices of what equals nothing before it."""
  return [i for i, one in enumerate(items) if one not in items[:i]]


def split_ids(
  parts: list[list[int]],
  tokenizer: HFTokenizer,
  max_length: int,
  prompt_limit: int,
) -> tuple[list[int], list[list[int]], Counter]:
  """Splits, ends and cuts one example.

  Args:
    parts: ids of the prompt alone, then of the prompt with each response.
    tokenizer: says which ids begin and end a text.
    max_length: most tokens of the prompt with one response.
    prompt_limit: most tokens of the prompt, at least 2 and below `max_length`.

  Returns:
    The prompt (begins with the beginning token, if the tokenizer or the text
    has one), the responses (each ends with one end token unless cut; those
    that equal one before them are left out), and notes on what was changed.

  Raises:
    Drop: nothing is left to predict, or nothing to predict it from.
  """
  begin, (alone, *wholes) = _strip_bos(parts, tokenizer)
  shared = len(alone)
  for whole in wholes:
    shared = common_prefix(alone[:shared], whole)
  if shared == 0 and not begin:
    raise Drop("empty_prompt", "no token to predict the answer from")
  prompt = begin + alone[:shared]
  responses = [_end(whole[shared:], tokenizer) for whole in wholes]
  notes = Counter(boundary_moved=int(shared < len(alone)))
  responses = _different(
    responses, notes, "identical_responses", "all answers have equal tokens"
  )
  if len(prompt) > prompt_limit:
    notes["prompt_cut"] = 1
    prompt = begin + prompt[len(begin) - prompt_limit :]
  room = max_length - len(prompt)
  if any(len(response) > room for response in responses):
    notes["response_cut"] = 1
    responses = _different(
      [response[:room] for response in responses],
      notes,
      "identical_after_cut",
      f"the first {room} tokens of all answers are equal",
    )
  assert prompt and all(responses), "a prompt or a response without tokens"
  return prompt, responses, notes


def _different(
  responses: list[list[int]], notes: Counter, reason: str, sentence: str
) -> list[list[int]]:
  """The responses that equal none before them; Drop if that leaves one."""
  kept = distinct(responses)
  if len(kept) < min(2, len(responses)):
    raise Drop(reason, sentence)
  if len(kept) < len(responses):
    notes["duplicate_left_out"] = 1
  return [responses[i] for i in kept]


def _strip_bos(
  parts: list[list[int]], tokenizer: HFTokenizer
) -> tuple[list[int], list[list[int]]]:
  """The beginning token (or none), and the ids without it."""
  bos = tokenizer.bos_id
  if bos is None:
    return [], parts
  wanted = tokenizer.adds_bos
  stripped = []
  for ids in parts:
    start = 0
    while start < len(ids) and ids[start] == bos:
      start += 1
    wanted = wanted or start > 0
    stripped.append(ids[start:])
  return [bos] if wanted else [], stripped


def _end(ids: list[int], tokenizer: HFTokenizer) -> list[int]:
  """`ids` with one end token last; blank text behind it is cut."""
  eos = tokenizer.eos_id
  end = len(ids)
  tail = ids[-8:]
  if eos in tail:
    behind = tail[::-1].index(eos)
    if not behind or not tokenizer.decode(ids[-behind:]).strip():
      end -= behind
      while end and ids[end - 1] == eos:
        end -= 1
  if end == 0:
    raise Drop("empty_response", "an answer of no tokens")
  return [*ids[:end], eos]
