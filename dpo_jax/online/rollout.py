"""Prompts to answers to rewards."""

import time
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.build import Built
from dpo_jax.config import Config
from dpo_jax.data.store import Examples
from dpo_jax.online.rewards import Rewards
from dpo_jax.sample import make_sampler


class Rollout(NamedTuple):
  """G answers to each of N prompts; all numpy."""

  prompts: list[np.ndarray]  # i32[p] each
  tokens: np.ndarray  # i32[N G R]
  logps: np.ndarray  # f32[N G R], as sampled, at temperature 1
  lengths: np.ndarray  # i32[N G], with the end token
  ended: np.ndarray  # bool[N G], False where an answer was cut off
  scores: np.ndarray  # f32[N G], rewards less penalties; NaN where it failed
  seconds: float

  @property
  def responses(self) -> list[list[np.ndarray]]:
    """Token ids of each answer to each prompt."""
    return [
      [row[:n] for row, n in zip(rows, lengths, strict=True)]
      for rows, lengths in zip(self.tokens, self.lengths, strict=True)
    ]

  @property
  def valid(self) -> np.ndarray:
    """bool[N G], whose reward is known."""
    return ~np.isnan(self.scores)

  @property
  def mask(self) -> np.ndarray:
    """bool[N G R], the tokens of answers."""
    return np.arange(self.tokens.shape[2]) < self.lengths[..., None]


class Roller:
  """Answers prompts with the policy as it is, and has the answers scored."""

  def __init__(self, config: Config, built: Built, rewards: Rewards):
    o, tokenizer = config.online, built.tokenizer
    self._seed, self._missing_end = config.seed, o.missing_end
    self._stops = np.array(tokenizer.stop_ids)
    self._rewards = rewards
    self._sampler = make_sampler(
      built.model,
      max_tokens=o.max_tokens,
      stop_ids=tokenizer.stop_ids,
      pad_id=tokenizer.pad_id,
      temperature=o.temperature,
      top_k=o.top_k,
      top_p=o.top_p,
      batch_size=config.sample.batch_size,
      mesh=built.mesh,
    )

  def __call__(
    self,
    policy: Any,
    examples: Examples,
    members: np.ndarray,
    answers: int,
    *number: int,
    strict: bool = True,
  ) -> Rollout:
    """Answers some prompts.

    Args:
      policy: its variables.
      examples: that the prompts are from.
      members: which they are, i64[N].
      answers: G, to each of them.
      *number: says, with the seed of the run, which random numbers to take.
      strict: whether one of the answers must have a reward.

    Raises:
      ConfigError: strict, and none has.
    """
    begun = time.perf_counter()
    prompts = [np.asarray(examples.prompt(i)) for i in members]
    asked = [prompt for prompt in prompts for _ in range(answers)]
    (seed,) = np.random.SeedSequence([self._seed, *number]).generate_state(1)
    tokens, logps, lengths = self._sampler(policy, asked, int(seed))
    last = np.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    ended = np.isin(last, self._stops)
    responses = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    scores = self._rewards(asked, responses, strict)
    scores = scores - np.float32(self._missing_end) * ~ended
    shape = len(prompts), answers
    return Rollout(
      prompts,
      tokens.reshape(*shape, -1),
      logps.reshape(*shape, -1),
      lengths.reshape(shape),
      ended.reshape(shape),
      scores.reshape(shape),
      time.perf_counter() - begun,
    )
