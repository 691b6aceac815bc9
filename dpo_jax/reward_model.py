"""A trained reward model beside a policy: rewards of answers, by token ids."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax import sharding
from dpo_jax.build import Built, model_of
from dpo_jax.data.layout import MAX_EXAMPLES
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  token_cost,
)
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf
from dpo_jax.reward_score import RewardScore

_SHORTEST = 256  # tokens of a row, at least
_LIMIT = 2**14  # row tokens a device scores at a time, about

Ids = Sequence[int]


def load(path: str | os.PathLike, built: Built) -> "Scorer":
  """Reads a folder in the Hugging Face layout of sequence classification, as
  training with the loss "reward" exports it.

  Args:
    path: of the folder.
    built: of the policy; its mesh and dtypes are the reward model's too.

  Raises:
    CheckpointError: damaged, no reward model, or one with another tokenizer.
    DataError: its tokenizer is damaged.
  """
  path = os.path.expanduser(path)
  family, shape = hf.read_config(path)
  if not shape.scalar_head:
    raise CheckpointError(
      f"{path}: a language model; expected a reward model, whose config.json"
      ' names an architecture "...ForSequenceClassification"'
    )
  tokenizer = load_tokenizer(path)
  if tokenizer.fingerprint != built.tokenizer.fingerprint:
    raise CheckpointError(
      f"{path}: the reward model has another tokenizer than the policy, and"
      " would be given ids that mean something else to it"
    )
  compute = built.model.compute
  if shape.head_dim != built.model.config.head_dim:
    compute = dataclasses.replace(compute, attention="auto")
  model = model_of(family, shape, compute, built.mesh)
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  variables = hf.load_variables(
    path, family.HF_NAMES, sharding.placed(abstract, built.mesh)
  )
  return Scorer(model, variables, built.mesh)


class Scorer:
  """(prompts, responses) -> their rewards, with what was compiled kept."""

  def __init__(self, model: Any, variables: Any, mesh: Any):
    """Takes a model with a scalar head, and its variables."""
    self.model, self.variables = model, variables
    self._mesh = mesh
    self._step = jax.jit(
      RewardScore(model), out_shardings=sharding.replicated(mesh)
    )

  def __call__(
    self, prompts: Sequence[Ids], responses: Sequence[Ids]
  ) -> np.ndarray:
    """Scores each response at its last token.

    Answers are packed; neighbours with one prompt share it, two by two. Rows
    are as long as the longest example, rounded up to a power of two, and their
    number is rounded as well, so that few shapes are compiled.

    Args:
      prompts: token ids, at least one each.
      responses: token ids, end token included; an empty one is scored at its
        prompt's last token. Of many processes, each gives the same.

    Returns:
      f32[N].
    """
    if len(prompts) != len(responses):
      raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses")
    rewards = np.zeros(len(prompts), np.float32)
    pairs = list(_pairs(prompts))
    examples = [_example(prompts, responses, pair) for pair in pairs]
    for batch, ids in self._batches(examples):
      scored = self._step(self.variables, sharding.put_batch(batch, self._mesh))
      scores = jax.device_get(scored.logps)
      for row, members in enumerate(ids):
        for place, member in enumerate(members):
          pair = pairs[member]
          rewards[list(pair)] = scores[row, place, : len(pair)]
    return rewards

  def _batches(self, examples: Sequence[Example]) -> Iterator[Any]:
    """Batches, and for each of their rows which examples lie there."""
    if not examples:
      return
    costs = [_cost(example) for example in examples]
    tokens = max(_SHORTEST, 1 << (max(costs) - 1).bit_length())
    rows = _fill(costs, tokens)
    shards = sharding.batch_shards(self._mesh)
    most = shards * max(1, _LIMIT // tokens)
    shape = RowShape(tokens, tokens, MAX_EXAMPLES)
    for start in range(0, len(rows), most):
      ids = rows[start : start + most]
      batch = empty_batch(shards * _rounded(-(-len(ids) // shards)), shape)
      for row, members in enumerate(ids):
        fill_row(batch, row, (examples[i] for i in members))
      yield batch, ids


def _pairs(prompts: Sequence[Ids]) -> Iterator[tuple[int, ...]]:
  """Indices of neighbours that share a prompt, two by two, and of the rest."""
  i = 0
  while i < len(prompts):
    two = i + 1 < len(prompts) and np.array_equal(prompts[i], prompts[i + 1])
    yield (i, i + 1) if two else (i,)
    i += 1 + two


def _example(prompts, responses, pair) -> Example:
  """One or two answers to a prompt, closed as in `data.closing`: the last token
  of a row's branch is not read, so any will do."""
  closing, nothing = np.zeros(1, np.int32), np.zeros(0, np.int32)
  first, *second = (
    np.concatenate([np.asarray(responses[i], np.int32), closing]) for i in pair
  )
  prompt = np.asarray(prompts[pair[0]], np.int32)
  return Example(prompt, first, *(second or [nothing]))


def _cost(example: Example) -> int:
  return int(token_cost(len(example.prompt), *map(len, example.responses)))


def _fill(costs: Sequence[int], most: int) -> list[list[int]]:
  """Indices of what goes into each row of `most` tokens: the largest first,
  each into the first row with room."""
  rows: list[list[int]] = []
  room: list[int] = []
  for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
    fits = (
      row
      for row, left in enumerate(room)
      if costs[i] <= left and len(rows[row]) < MAX_EXAMPLES
    )
    row = next(fits, len(rows))
    if row == len(rows):
      rows.append([])
      room.append(most)
    rows[row].append(i)
    room[row] -= costs[i]
  return rows


def _rounded(n: int) -> int:
  """Up to 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: a quarter more at
  most."""
  step = 1 << max(0, (n - 1).bit_length() - 3)
  return -(-n // step) * step
