"""What a policy says: answers to held-out prompts, their reward and their KL.

Answers drawn at temperature 1 without cut-offs also estimate the KL divergence
of the policy from its reference: the mean of log pi(y|x) - log ref(y|x).
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax import sharding
from dpo_jax.build import Built
from dpo_jax.config import Sample
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples
from dpo_jax.errors import ConfigError
from dpo_jax.evaluate import score_examples
from dpo_jax.sample import Sampled, make_sampler
from dpo_jax.update import Variables

Reward = Callable[[str, str], float]


class Answers(NamedTuple):
  prompts: list[str]
  responses: list[str]
  rewards: list[float] | None  # if a reward function was named
  sampled: Sampled


class Answerer:
  """Answers a fixed set of prompts, always with the same random numbers."""

  def __init__(
    self,
    built: Built,
    settings: Sample,
    prompts: Sequence[Sequence[int]],
    seed: int,
  ):
    """Takes prompts as token ids.

    Raises:
      ConfigError: the reward function cannot be imported.
    """
    self.prompts = prompts
    self.reward = load_reward(settings.reward) if settings.reward else None
    self.settings = settings
    self._built = built
    self._tokenizer = tokenizer = built.tokenizer
    self._seed = seed
    self._sampler = make_sampler(
      built.model,
      max_tokens=settings.max_tokens,
      stop_ids=tokenizer.stop_ids,
      pad_id=tokenizer.pad_id,
      temperature=settings.temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
      batch_size=settings.batch_size,
      mesh=built.mesh,
    )

  def __call__(self, variables: Variables) -> Answers:
    sampled = self._sampler(variables, self.prompts, self._seed)
    prompts = [self._tokenizer.decode(p) for p in self.prompts]
    responses = [
      self._tokenizer.decode(row[:n])
      for row, n in zip(sampled.tokens, sampled.lengths, strict=True)
    ]
    rewards = None
    if self.reward:
      rewards = [
        self._score(p, r) for p, r in zip(prompts, responses, strict=True)
      ]
    return Answers(prompts, responses, rewards, sampled)

  def asked(self, rows: Sequence[dict]) -> bool:
    """Whether rows of samples.jsonl are answers to these prompts, scored if
    these are."""
    prompts = [self._tokenizer.decode(p) for p in self.prompts]
    return [row.get("prompt") for row in rows] == prompts and all(
      (row.get("reward_before") is None) == (self.reward is None)
      for row in rows
    )

  def _score(self, prompt: str, response: str) -> float:
    try:
      return float(self.reward(prompt, response))
    except Exception as e:
      raise ConfigError(
        f"config.sample.reward={self.settings.reward!r} failed on a prompt and"
        f" a response: {type(e).__name__}: {e}"
      ) from e

  def kl(
    self, policy: Variables, reference: Variables, sampled: Sampled
  ) -> dict[str, float] | None:
    """KL(policy || reference) in nats per response, from the policy's answers.

    Returns:
      {"mean", "standard_error"}, or None if the answers were not drawn from
      the policy itself (greedy, or cut off by top_k or top_p).
    """
    s = self.settings
    if s.temperature != 1 or s.top_k or s.top_p < 1:
      return None
    responses = [
      row[:n] for row, n in zip(sampled.tokens, sampled.lengths, strict=True)
    ]
    mesh, score = self._built.mesh, self._built.score
    plan = Plan(
      as_examples(self.prompts, responses),
      batch_size=min(len(responses), 32),
      shuffle=False,
      rows_multiple=sharding.batch_shards(mesh),
      scored_multiple=8 * mesh.shape["tensor"],
    )
    ratios = (
      score_examples(score, policy, plan, mesh).logps[:, 0]
      - score_examples(score, reference, plan, mesh).logps[:, 0]
    )
    error = (
      ratios.std(ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0
    )
    return {"mean": float(ratios.mean()), "standard_error": float(error)}


def as_examples(
  prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> Examples:
  """Token ids as examples of one response each."""
  pieces = [x for pair in zip(prompts, responses, strict=True) for x in pair]
  p = np.array([len(x) for x in prompts], np.int32)
  r = np.array([len(x) for x in responses], np.int32)
  n = len(p)
  return Examples(
    tokens=np.concatenate(pieces).astype(np.int32),
    offsets=np.concatenate([[0], np.cumsum(p + r)]).astype(np.int64),
    prompt_lengths=p,
    lengths=np.stack([r, np.zeros(n, np.int32)], axis=1),
    desirable=np.ones(n, bool),
    margins=np.zeros(n, np.float32),
    rows=np.arange(n),
    subsets=np.zeros(n, np.int32),
    subset_names=("",),
    kind="sft",
    format="ids",
    report={},
    fingerprint="",
  )


def load_reward(name: str, setting: str = "sample.reward") -> Reward:
  """Imports "module:function", as a setting has it.

  Raises:
    ConfigError: there is no such thing.
  """
  module, _, function = name.partition(":")
  try:
    reward = getattr(importlib.import_module(module), function)
    if not callable(reward):
      raise TypeError(f"{reward!r} cannot be called")
    return reward
  except (ImportError, AttributeError, ValueError, TypeError) as e:
    raise ConfigError(
      f"config.{setting}={name!r}: {e}; expected 'module:function' taking"
      " a prompt and a response"
    ) from e


def sample_rows(before: Answers) -> list[dict]:
  """Rows of samples.jsonl at the start; the end of the run adds "after"."""
  rewards = before.rewards or [None] * len(before.prompts)
  return [
    {"step": 0, "prompt": prompt, "before": response, "reward_before": reward}
    for prompt, response, reward in zip(
      before.prompts, before.responses, rewards, strict=True
    )
  ]


def distinct_prompts(examples: Examples, n: int) -> list[np.ndarray]:
  """Token ids of the first n prompts that differ."""
  seen: dict[bytes, np.ndarray] = {}
  for i in range(len(examples)):
    if len(seen) == n:
      break
    prompt = np.asarray(examples.prompt(i))
    seen.setdefault(prompt.tobytes(), prompt)
  return list(seen.values())
