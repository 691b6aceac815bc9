"""A second generated corpus, with more to learn: some words are liked of
everything, and each a little more or less of each thing.

Somebody's thing is described by three words out of 16. What a word is worth of
a thing is a fixed number, the sum of one for the word (standard normal times
0.6) and one for word and thing (times 0.36), with mean 0; the true reward of a
description is what its words are worth together. Preferences between two random
descriptions are drawn from Bradley-Terry with that reward. All is short, so
that many models can be trained on it in minutes; and as the descriptions to
begin with are uniform, the best reward that any policy can have at a KL is a
sum over 16 words.
"""

import json
import math
import pathlib
import random
from collections.abc import Sequence

import numpy as np

NAMES = (
  "Al", "Bo", "Cy", "Di", "Ed", "Fi", "Gi", "Hu", "Io", "Jo", "Ka", "Li",
  "Mo", "Ny", "Ol", "Pi", "Qi", "Ro", "Sy", "Ty", "Ur", "Vi", "Wu", "Yo",
)  # fmt: skip
THINGS = ("ale", "bun", "cup", "dog", "elm", "fan", "hat", "ink")
WORDS = (
  "apt", "big", "coy", "dry", "fit", "hot", "icy", "low",
  "mad", "new", "old", "raw", "shy", "tan", "wet", "zen",
)  # fmt: skip
COUNT = 3  # words of a description
_COMMON, _OWN = 0.6, 0.36
_MISSING = 2.0  # what a word too few, too many or unknown costs


def _worth() -> np.ndarray:
  rng = random.Random("tastes")
  common = [rng.gauss(0, _COMMON) for _ in WORDS]
  worth = np.array([[c + rng.gauss(0, _OWN) for c in common] for _ in THINGS])
  return worth - worth.mean()


WORTH = _worth()  # f64[thing word]


def true_reward(prompt: str, response: str) -> float:
  """The words' worth in sum, less 2 for each that is missing, too many, or no
  word of the 16.

  >>> true_reward("Al's cup:", " coy coy coy.") == 3 * WORTH[2, 2]
  True
  """
  thing = THINGS.index(prompt.removesuffix(":").split()[-1])
  said = response.strip().removesuffix(".").split()
  known = [WORTH[thing, WORDS.index(w)] for w in said[:COUNT] if w in WORDS]
  wrong = max(len(said), COUNT) - len(known)
  return float(sum(known)) - _MISSING * wrong


def frontier(betas: Sequence[float]) -> np.ndarray:
  """The policies ref exp(r / beta) / Z, which no other of their KL outdoes.

  Words are drawn independently, and so is what they earn and cost: three times
  that of one word, mean over things.

  Returns:
    f64[betas 2], KL in nats a response and true reward.
  """
  points = []
  for beta in betas:
    tilted = WORTH / beta
    odds = np.exp(tilted - tilted.max(axis=1, keepdims=True))
    p = odds / odds.sum(axis=1, keepdims=True)
    logp = np.log(np.maximum(p, 1e-300))
    kl = (p * (logp + math.log(len(WORDS)))).sum(axis=1).mean()
    points.append((COUNT * kl, COUNT * (p * WORTH).sum(axis=1).mean()))
  return np.array(points)


def best_possible() -> float:
  """The mean true reward of the best description of each thing."""
  return COUNT * float(WORTH.max(axis=1).mean())


def bayes_accuracy(pairs: Sequence[dict[str, str]]) -> float:
  """Share of pairs whose chosen description has the higher true reward."""
  gaps = [
    true_reward(p["prompt"], p["chosen"])
    - true_reward(p["prompt"], p["rejected"])
    for p in pairs
  ]
  return float(np.mean([0.5 * (1 + np.sign(gap)) for gap in gaps]))


def write_tastes(
  directory: str | pathlib.Path, *, sft: int = 0, pairs: int = 0, seed: int = 0
) -> None:
  """Writes `sft.jsonl` (prompt, completion) and `pairs.jsonl` (prompt, chosen,
  rejected) of so many rows; none where it is 0. The first n pairs of a seed are
  the same, however many there are."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for name, count, row in (("sft", sft, _told), ("pairs", pairs, _pair)):
    rng = random.Random(f"{name} {seed}")
    if count:
      lines = [json.dumps(row(rng)) + "\n" for _ in range(count)]
      (directory / f"{name}.jsonl").write_text("".join(lines))


def _ask(rng: random.Random) -> str:
  return f"{rng.choice(NAMES)}'s {rng.choice(THINGS)}:"


def _answer(rng: random.Random) -> str:
  return f" {' '.join(rng.choices(WORDS, k=COUNT))}."


def _told(rng: random.Random) -> dict[str, str]:
  return {"prompt": _ask(rng), "completion": _answer(rng)}


def _pair(rng: random.Random) -> dict[str, str]:
  prompt = _ask(rng)
  one, other = _answer(rng), _answer(rng)
  gap = true_reward(prompt, one) - true_reward(prompt, other)
  if rng.random() > 1 / (1 + math.exp(-gap)):
    one, other = other, one
  return {"prompt": prompt, "chosen": one, "rejected": other}
