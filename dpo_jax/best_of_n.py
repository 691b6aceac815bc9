"""Best of n: a policy's answers, of which a reward model picks one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax import reward_model
from dpo_jax.answers import Answerer, distinct_prompts
from dpo_jax.build import build, load_data
from dpo_jax.config import Config
from dpo_jax.errors import ConfigError
from dpo_jax.weights import load_variables


class Best(NamedTuple):
  """What the best of n answers is worth, and how far it lies from one."""

  n: int
  reward: float  # by `config.sample.reward`, mean over prompts
  reward_error: float  # its standard error over prompts
  kl: float  # of the empirical distribution, nats a response
  analytic_kl: float  # log n - (n - 1) / n


def analytic_kl(n: int) -> float:
  """KL(best of n || one) in nats where no two answers score alike, and an upper
  bound where some do (2112.09332; 2401.01879)."""
  return math.log(n) - (n - 1) / n


def pick(
  scores: np.ndarray, rewards: np.ndarray, n: int
) -> tuple[float, float]:
  """The best by score of n drawn, with replacement, from given answers.

  The best has a score of at most s with probability F(s)^n, so what it is and
  how unlikely are sums over the answers, and no drawing adds noise. Answers
  that score alike share what is theirs.

  Args:
    scores: f[N], what is picked by.
    rewards: f[N], what is asked about.
    n: answers that are compared.

  Returns:
    Its expected reward, and KL(best of n || one) in nats.
  """
  levels, at = np.unique(scores, return_inverse=True)
  one = np.bincount(at, minlength=len(levels)) / len(scores)
  below = np.concatenate([[0.0], np.cumsum(one)])
  best = np.diff(below**n)
  mean = np.bincount(at, rewards) / np.bincount(at)
  known = best > 0
  kl = (best[known] * np.log(best[known] / one[known])).sum()
  return float((best * mean).sum()), float(kl)


def best_of_n(
  config: Config, scorer: str, counts: Sequence[int], answers: int
) -> list[Best]:
  """Answers held-out prompts many times and picks by a reward model.

  Args:
    config: `model.path` answers, `data` holds the prompts, `sample` says how
      many of them are asked and what the true reward is.
    scorer: folder of the reward model.
    counts: every n to report.
    answers: to each prompt; several times the largest n.

  Raises:
    UserError: one line for what is missing or does not fit.
  """
  if not config.sample.reward or max(counts) > answers:
    raise ConfigError(
      f"best of {max(counts)} needs config.sample.reward and at least as many"
      f" answers to a prompt; there are {config.sample.reward!r} and {answers}"
    )
  built = build(config)
  held_out = load_data(config, built, config.make_loss()).held_out
  prompts = distinct_prompts(held_out, config.sample.prompts)
  asked = [prompt for prompt in prompts for _ in range(answers)]
  policy = load_variables(config, built)
  given = Answerer(built, config.sample, asked, config.seed)(policy)
  tokens = [
    row[:n]
    for row, n in zip(given.sampled.tokens, given.sampled.lengths, strict=True)
  ]
  scores = reward_model.load(scorer, built)(asked, tokens)
  by_prompt = scores.reshape(-1, answers)
  rewards = np.reshape(given.rewards, by_prompt.shape)
  found = []
  for n in counts:
    picked = [pick(*x, n) for x in zip(by_prompt, rewards, strict=True)]
    reward, kl = np.array(picked).T
    error = reward.std(ddof=1) / math.sqrt(len(reward))
    found.append(
      Best(
        n, float(reward.mean()), float(error), float(kl.mean()), analytic_kl(n)
      )
    )
  return found
