"""What tests of online runs share: a small model, rewards, settings."""

import re

import numpy as np
from runs import small_config

SETTINGS = {
  "data.row_length": 0,
  "data.row_counts": 1,
  "data.max_length": 96,
  "data.max_prompt_length": 72,
  "online.reward": "online_runs:vowels",
  "online.max_tokens": 8,
  "optim.learning_rate": 3e-2,
  "optim.schedule": "constant",
  "optim.warmup": 0.0,
  "train.batch_size": 8,
  "train.steps": 10,
  "train.eval_every": 0,
  "train.checkpoint_every": 3,
  "train.log_every": 1,
  "sample.prompts": 0,
  "train.export": False,
}
OF = {
  "ppo": {"online.group": 2, "online.epochs": 2, "online.minibatches": 2,
          "online.kl": 0.01, "online.kl_target": 3.0,
          "online.kl_horizon": 100},
  "grpo": {"online.kl": 0.01, "online.group": 3},
  "pairs": {"online.group": 3, "loss.beta": 0.05},
}  # fmt: skip


def online_config(corpus, method, **changes):
  values = {"online.method": method} | SETTINGS | OF[method] | changes
  return small_config(corpus, **values)


def vowels(prompt, response):
  """Share of small vowels among the letters of an answer."""
  assert prompt.startswith("Q: ")
  letters = re.findall(r"\S", response)
  return np.mean([x in "aeiou" for x in letters]) if letters else 0.0


def moody(prompt, response):
  """As `vowels`, but some answers break it and some are worth nothing."""
  kind = sum(map(ord, response)) % 3
  if kind == 0:
    raise ValueError("no\nopinion")
  return float("nan") if kind == 1 else vowels(prompt, response)


def never(prompt, response):
  raise ValueError("no\nopinion")


def always_one(prompt, response):
  return 1


def huge(prompt, response):
  return 1e300
