"""A generated preference corpus whose true reward is known.

People ask what something is like; answers praise or scold, and sometimes talk
of another thing. The true reward counts kind words minus unkind ones, less a
penalty for the wrong subject. Preferences between two random answers are drawn
from Bradley-Terry with that reward, and rankings of three from Plackett-Luce,
so the best achievable numbers are known too.
"""

import json
import math
import pathlib
import random
import re

_PEOPLE = ("Ana", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_THINGS = ("dog", "boat", "soup", "song", "kite", "hat", "cake", "garden")
KIND = ("lovely", "bright", "gentle", "clever", "merry", "splendid")
UNKIND = ("dreary", "nasty", "clumsy", "rotten", "gloomy", "dull")
_WRONG_SUBJECT = 2.0  # penalty
_RANKED = 3  # answers in a ranking


def true_reward(prompt: str, response: str) -> float:
  """Kind minus unkind words, minus 2 if the answer is not about the subject.

  >>> true_reward("Q: What is Ana's dog like?\\nA:",
  ...             " Ana's dog is merry and dull.")
  0.0
  """
  words = re.findall(r"[a-z]+", response.lower())
  score = sum(w in KIND for w in words) - sum(w in UNKIND for w in words)
  subject = prompt.partition("What is ")[2].partition(" like")[0]
  return score - (0.0 if subject in response else _WRONG_SUBJECT)


def write_corpus(
  directory: str | pathlib.Path, *, pairs: int = 4000, seed: int = 0
) -> dict[str, pathlib.Path]:
  """Writes `sft.jsonl` (prompt, completion) and `pairs.jsonl` (prompt, chosen,
  rejected), one seeded stream for both, and `rankings.jsonl` (prompt,
  responses) from another; `pairs` rows each.

  Returns:
    The three paths, under "sft", "pairs" and "rankings".
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  rng = random.Random(seed)
  rankings = random.Random(f"rankings {seed}")
  sft = [_ask(rng) for _ in range(pairs)]
  rows = {
    "sft": [{"prompt": p, "completion": _answer(rng, p)} for p in sft],
    "pairs": [_pair(rng) for _ in range(pairs)],
    "rankings": [_ranking(rankings) for _ in range(pairs)],
  }
  paths = {}
  for name, lines in rows.items():
    paths[name] = directory / f"{name}.jsonl"
    paths[name].write_text("".join(json.dumps(x) + "\n" for x in lines))
  return paths


def _ask(rng: random.Random) -> str:
  subject = f"{rng.choice(_PEOPLE)}'s {rng.choice(_THINGS)}"
  return f"Q: What is {subject} like?\nA:"


def _answer(rng: random.Random, prompt: str) -> str:
  subject = prompt.partition("What is ")[2].partition(" like")[0]
  if rng.random() < 0.04:
    subject = f"{rng.choice(_PEOPLE)}'s {rng.choice(_THINGS)}"
  first, second = (rng.choice(rng.choice((KIND, UNKIND))) for _ in range(2))
  return f" {subject} is {first} and {second}."


def _pair(rng: random.Random) -> dict[str, str]:
  prompt = _ask(rng)
  one, other = _answer(rng, prompt), _answer(rng, prompt)
  gap = true_reward(prompt, one) - true_reward(prompt, other)
  if rng.random() > 1 / (1 + math.exp(-gap)):
    one, other = other, one
  return {"prompt": prompt, "chosen": one, "rejected": other}


def _ranking(rng: random.Random) -> dict[str, str | list[str]]:
  """Different answers, best first: each place goes to one of those left, with
  odds of e to its reward."""
  prompt = _ask(rng)
  left: list[str] = []
  while len(left) < _RANKED:
    answer = _answer(rng, prompt)
    if answer not in left:
      left.append(answer)
  ranked = []
  while left:
    odds = [math.exp(true_reward(prompt, answer)) for answer in left]
    ranked += rng.choices(left, odds)
    left.remove(ranked[-1])
  return {"prompt": prompt, "responses": ranked}
