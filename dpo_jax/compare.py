"""Several runs from one starting point, judged alike."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import evaluate, losses, sharding
from dpo_jax.answers import Answerer, distinct_prompts
from dpo_jax.build import build, load_data
from dpo_jax.config import Config
from dpo_jax.data.plan import Plan
from dpo_jax.errors import ConfigError
from dpo_jax.weights import load_variables


class Row(NamedTuple):
  """What became of one policy; log-probs and margins in nats a response."""

  name: str
  reward: float  # mean over answers to the prompts of held-out pairs
  reward_error: float  # its standard error
  accuracy: float  # share of held-out pairs whose log-ratios are in order
  margin: float  # mean difference of these log-ratios
  chosen: float  # change of the mean log-prob of held-out chosen responses
  rejected: float  # likewise of rejected ones
  kl: float  # KL(policy || start), estimated from the answers
  tokens: float  # mean length of an answer


def compare(config: Config, models: Mapping[str, str]) -> list[Row]:
  """Judges models by one measure, whatever each was trained with.

  Args:
    config: `model.path` is what all started from, `data` holds pairs of which
      the first `eval_rows` are held out, `sample` says how answers are drawn
      and rewarded. Its loss does not matter: the measure is the log-ratio.
    models: folders by name, of the same architecture.

  Returns:
    A row for the start and for each model, in order.

  Raises:
    UserError: one line for what is missing or does not fit.
  """
  config = dataclasses.replace(config, loss={"name": "dpo", "beta": 1.0})
  loss, built = config.make_loss(), build(config)
  held_out = load_data(config, built, loss).held_out
  if held_out is None:
    raise ConfigError(
      "config.data.eval_rows=0 holds out nothing to compare by; name how many"
      " rows to hold out"
    )
  plan = Plan(
    held_out,
    batch_size=config.train.batch_size,
    shuffle=False,
    rows_multiple=sharding.batch_shards(built.mesh),
    scored_multiple=8 * built.mesh.shape["tensor"],
  )
  evaluator = evaluate.make_evaluator(built.score, loss, built.mesh)
  prompts = distinct_prompts(held_out, config.sample.prompts)
  answerer = Answerer(built, config.sample, prompts, config.seed)
  start = load_variables(config, built)

  def judge(name: str, policy: Any) -> Row:
    means = evaluator(policy, start, plan).means
    answers = answerer(policy)
    rewards = np.array(answers.rewards or [math.nan])
    kl = answerer.kl(policy, start, answers.sampled)
    return Row(
      name=name,
      reward=float(rewards.mean()),
      reward_error=float(rewards.std(ddof=1) / math.sqrt(len(rewards))),
      accuracy=means["rewards/accuracies"],
      margin=means["rewards/margins"],
      # At beta 1 a reward is the change of the log-prob.
      chosen=means["rewards/chosen"],
      rejected=means["rewards/rejected"],
      kl=kl["mean"] if kl else math.nan,
      tokens=float(np.mean(answers.sampled.lengths)),
    )

  rows = [judge("start", start)]
  for name, path in models.items():
    rows.append(judge(name, load_variables(config, built, path)))
  return rows


def losses_to_compare() -> list[str]:
  """Names of all registered losses that train a policy."""
  return [n for n in losses.names() if not losses.make(n).needs_scores]
