"""What the runs of a comparison come to, over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from configs.compare_methods import METHODS
from methods.forms import Form, Job, chain
from methods.runs import Runs

TITLES = {
  "start": "SFT, the start",
  "chosen": "SFT on chosen",
  "best_of_n": "best-of-n",
  "dpo": "DPO",
  "ipo": "IPO",
  "kto": "KTO",
  "orpo": "ORPO",
  "ppo": "reward model + PPO",
  "grpo": "reward model + GRPO",
  "online_dpo": "online DPO",
  "ppo_true": "PPO on the true reward",
}


class Mean(NamedTuple):
  """Over seeds; the error is the standard error of the mean, and of one seed
  NaN."""

  value: float
  error: float


class Point(NamedTuple):
  """A method at one dial."""

  dial: float
  reward: Mean
  kl: Mean
  accuracy: Mean


class Row(NamedTuple):
  """A line of the table."""

  name: str
  data: str
  reference: bool  # whether training or use reads one
  stages: int  # of training, SFT among them
  dial: float
  reward: Mean
  kl: Mean
  at_budget: Mean  # true reward at `Form.kl`, NaN where it is not reached
  responses: int  # with a gradient, all stages after SFT
  seconds: float  # likewise; of the first seed, which compiles for the others
  memory: float  # bytes, the most of its stages; NaN where it is not known
  settings: int  # that differ from the defaults, all stages after SFT


def mean(values: Sequence[float]) -> Mean:
  """NaN where there is no value, or one is NaN."""
  n = len(values)
  if not n:
    return Mean(math.nan, math.nan)
  error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
  return Mean(float(np.mean(values)), error)


def reward_at(points: Sequence[tuple[float, float]], kl: float) -> float:
  """Reward of a policy as far from its start as `kl`, on the line through
  (KL, reward) of policies that are known; NaN beyond the farthest."""
  x, y = np.array(sorted(points)).T
  return float(np.interp(kl, x, y, right=math.nan))


class Results:
  """Reads what `Runs` has trained and judged."""

  def __init__(self, runs: Runs):
    """Judges what is not judged."""
    self.form: Form = runs.form
    self._runs = runs
    policies = [
      job
      for job in self.form.jobs()
      if job.method not in ("reward", "best_of_n")
    ]
    self._rows = runs.judge(policies)
    self._best = [runs.best_of(seed) for seed in range(self.form.seeds)]

  def frontier(self, method: str) -> list[Point]:
    """By dial, the one of the table among them."""
    dials = {METHODS[method][0], *self.form.dials}
    if method not in self.form.dialed:
      dials = {METHODS[method][0]}
    return [self.point(method, dial) for dial in sorted(d or 0 for d in dials)]

  def point(self, method: str, dial: float, pairs: int = 0) -> Point:
    """A method at a dial, trained on so many pairs."""
    of = lambda key: mean(
      [row[key] for row in self._of(method, dial, pairs or self.form.pairs)]
    )
    return Point(dial, of("reward"), of("kl"), of("accuracy"))

  def reward_model_accuracy(self, pairs: int) -> Mean:
    """Of the reward models of PPO."""
    jobs = [Job("reward", 0, s, pairs) for s in range(self.form.seeds)]
    return mean([self._runs.train(job)["accuracy"] for job in jobs])

  def start(self) -> Point:
    """The SFT model; seeds differ in the answers that are drawn."""
    return self.point("start", 0)

  def best(self) -> list[dict[str, Mean]]:
    """For each n, {"n", "reward", "kl", "analytic_kl"}."""
    return [
      {key: mean([x[key] for x in same]) for key in same[0]}
      for same in zip(*self._best, strict=True)
    ]

  def table(self) -> list[Row]:
    """The start, then by true reward at the KL of the form, then the rest."""
    start = self.start()
    first = Row(
      TITLES["start"], "answers", False, 1, math.nan, start.reward, start.kl,
      Mean(math.nan, math.nan), 0, 0.0, math.nan, 0,
    )  # fmt: skip
    rest = [self._row(method) for method in METHODS]
    rest.append(self._best_row())
    rank = lambda r: (math.isnan(r.at_budget.value), -r.at_budget.value)
    return [first, *sorted(rest, key=rank)]

  def _row(self, method: str) -> Row:
    dial = METHODS[method][0] or 0
    jobs = [Job(method, dial, s, self.form.pairs) for s in self._seeds]
    point = self.point(method, dial)
    return Row(
      TITLES[method], *_needs(self._runs.config(jobs[0])),
      1 + len(chain(jobs[0])), dial or math.nan, point.reward, point.kl,
      mean([self._at_budget(method, s) for s in self._seeds]),
      *self._cost(chain(jobs[0])),
    )  # fmt: skip

  def _best_row(self) -> Row:
    """At the n that comes nearest to the KL of the form."""
    best, kl = self.best(), self.form.kl
    at = min(best, key=lambda x: abs(x["kl"].value - kl))
    by_seed = [
      reward_at([(x["kl"], x["reward"]) for x in own], kl) for own in self._best
    ]
    jobs = [Job("best_of_n", 0, s, self.form.pairs) for s in self._seeds]
    return Row(
      TITLES["best_of_n"], "pairs", False, 2, at["n"].value, at["reward"],
      at["kl"], mean(by_seed), *self._cost(jobs[:1]),
    )  # fmt: skip

  def _at_budget(self, method: str, seed: int) -> float:
    rows = [self._rows[f"start seed{seed}"]]
    for point in self.frontier(method):
      job = Job(method, point.dial, seed, self.form.pairs)
      rows.append(self._rows[job.name])
    return reward_at([(r["kl"], r["reward"]) for r in rows], self.form.kl)

  def _cost(self, stages: Sequence[Job]) -> tuple[int, float, float, int]:
    first = [self._runs.train(job) for job in stages]
    memory = [r["peak_memory"] or math.nan for r in first]
    return (
      sum(r["responses"] for r in first),
      sum(r["wall_seconds"] for r in first),
      max(memory),
      sum(len(r["settings"]) for r in first),
    )

  def _of(self, method: str, dial: float, pairs: int) -> list[dict]:
    if method == "start":
      return [self._rows[f"start seed{s}"] for s in self._seeds]
    return [self._rows[Job(method, dial, s, pairs).name] for s in self._seeds]

  @property
  def _seeds(self) -> range:
    return range(self.form.seeds)


def _needs(config) -> tuple[str, bool]:
  """Data and reference, as loss and method say."""
  o = config.online
  if o.reward:
    return "prompts, rewards", True
  if o.method in ("ppo", "grpo"):
    return "pairs, prompts", o.method == "ppo" or o.kl > 0
  loss = config.make_loss()
  data = {"paired": "pairs", "unpaired": "labels", "sft": "answers"}
  if o.method:
    return "pairs, prompts", loss.needs_reference
  return data.get(loss.kind, loss.kind), loss.needs_reference
