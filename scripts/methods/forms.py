"""How large a comparison is, and the runs that it is made of."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from configs.compare_methods import METHODS, REWARDED


class Job(NamedTuple):
  """One run of training; `dial` is 0 where the method has none."""

  method: str
  dial: float
  seed: int
  pairs: int

  @property
  def name(self) -> str:
    """Its folder."""
    if self.method == "sft":
      return "sft"
    dial = f" {self.dial:g}" if self.dial else ""
    return f"{self.method}{dial} seed{self.seed} n{self.pairs}"


@dataclasses.dataclass(frozen=True)
class Form:
  seeds: int = 2
  dials: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 5.0)
  dialed: tuple[str, ...] = tuple(m for m in METHODS if m != "chosen")
  pairs: int = 5000  # but where their number is what is varied
  sizes: tuple[int, ...] = (300, 1000, 20000)
  sized: tuple[str, ...] = ("dpo", "ipo", "ppo")
  budget: int = 10240  # responses with a gradient, all stages after SFT
  kl: float = 1.0  # nats a response, at which methods are compared
  counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # n of best-of-n
  prompts: int = 192
  sft_steps: int = 400
  width: int = 48
  layers: int = 2

  def jobs(self) -> Iterator[Job]:
    """All runs, each before those that need it; seed by seed."""
    for seed in range(self.seeds):
      made = [Job("best_of_n", 0, seed, self.pairs)]
      made.append(Job("reward", 0, seed, self.pairs))
      made += [
        Job(method, dial or 0, seed, self.pairs)
        for method, (dial, *_) in METHODS.items()
      ]
      for dial in self.dials:
        made += [Job(method, dial, seed, self.pairs) for method in self.dialed]
      for size in self.sizes:
        made.append(Job("reward", 0, seed, size))
        made += [Job(m, METHODS[m][0], seed, size) for m in self.sized]
      yield from dict.fromkeys(made)


def chain(job: Job) -> list[Job]:
  """The runs behind a policy, those after SFT: the reward model's and its
  own."""
  if job.method in REWARDED:
    return [Job("reward", 0, job.seed, job.pairs), job]
  return [job]


QUICK = Form(
  seeds=1, dials=(0.1,), dialed=("dpo",), pairs=96, sizes=(32,),
  sized=("dpo",), budget=256, kl=0.05, counts=(1, 2, 4), prompts=12,
  sft_steps=20, width=16, layers=1,
)  # fmt: skip
FULL = Form(
  seeds=5,
  dials=(0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0),
  sizes=(300, 1000, 3000, 10000, 20000),
  budget=40960,
  counts=(1, 2, 4, 8, 16, 32, 64),
)
