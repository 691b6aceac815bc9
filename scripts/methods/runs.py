"""Trains what is not trained yet, and judges what is not judged yet."""

import json
import math
import pathlib
from typing import Any

import jax

from configs import compare_methods
from dpo_jax.best_of_n import best_of_n
from dpo_jax.compare import compare
from dpo_jax.config import Config, flatten, from_dict
from dpo_jax.data.tastes import write_tastes
from dpo_jax.errors import ConfigError
from dpo_jax.train import train
from methods.forms import Form, Job
from methods.peak import peak_memory

_HELD_OUT = 512  # pairs
_HELD_OUT_SEED = 10**6  # that no run has


class Runs:
  """The work directory of a comparison.

  data/          what all train on
  sft/ dpo .../  a run each, see `Job.name`
  xla/           programs, which the seeds share
  judged.json    what became of each
  """

  def __init__(self, workdir: pathlib.Path, form: Form):
    """Writes the data; takes up what was judged before.

    Raises:
      ConfigError: the directory is of a comparison of another form.
    """
    self.root, self.form = workdir, form
    workdir.mkdir(parents=True, exist_ok=True)
    self._file = workdir / "judged.json"
    sizes = {
      k: list(v) if isinstance(v, tuple) else v
      for k, v in vars(form).items()
      if k in _DECISIVE
    }
    self.judged = {"form": sizes}
    if self._file.exists():
      self.judged = json.loads(self._file.read_text())
      if (there := self.judged["form"]) != sizes:
        raise ConfigError(
          f"{workdir} holds a comparison of another form, {there}, and not"
          f" {sizes}; take another --workdir"
        )
    self._write()
    if not jax.config.jax_compilation_cache_dir:
      jax.config.update("jax_compilation_cache_dir", str(workdir / "xla"))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
      jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    data = workdir / "data"
    if not (data / "held_out").exists():
      write_tastes(data, sft=4 * form.pairs)
      write_tastes(data / "held_out", pairs=_HELD_OUT, seed=_HELD_OUT_SEED)

  def train(self, job: Job) -> dict[str, Any]:
    """Trains, or finds it done.

    Returns:
      {"model_dir", "wall_seconds", "peak_memory", "settings", "responses",
      "accuracy"}: memory in bytes, by which the process grew at most while it
      trained (None where the platform does not tell); settings that differ from
      the defaults; responses with a gradient; accuracy of a reward model.
    """
    known = self.judged.setdefault("trained", {})
    if job.name not in known:
      print(f"\n{job.name}", flush=True)
      self._data(job)
      config = self.config(job)
      with peak_memory() as peak:
        summary = train(config, self.root / job.name)
      known[job.name] = {
        "model_dir": summary["model_dir"],
        "wall_seconds": summary["wall_seconds"],
        "peak_memory": None if math.isnan(peak.rise) else peak.rise,
        "settings": settings(config),
        "responses": responses(config),
        "accuracy": (summary["final_eval"] or {}).get("rewards/accuracies"),
      }
      self._write()
    return known[job.name]

  def sft(self) -> dict[str, Any]:
    """The one that all start from."""
    return self.train(Job("sft", 0, 0, 0))

  def judge(self, jobs: list[Job]) -> dict[str, dict[str, float]]:
    """`compare.Row` of each policy, by name of its job, and of the "start"."""
    known = self.judged.setdefault("rows", {})
    for seed in sorted({job.seed for job in jobs}):
      own = {j.name: j for j in jobs if j.seed == seed and j.name not in known}
      start = f"start seed{seed}"
      if own or start not in known:
        models = {name: self.train(j)["model_dir"] for name, j in own.items()}
        rows = compare(self._judging(seed), models)
        known[start] = rows[0]._asdict()
        known |= {row.name: row._asdict() for row in rows[1:]}
        self._write()
    return known

  def best_of(self, seed: int) -> list[dict[str, float]]:
    """`best_of_n.Best` for each n."""
    known = self.judged.setdefault("best_of_n", {})
    if str(seed) not in known:
      scorer = self.train(Job("best_of_n", 0, seed, self.form.pairs))
      counts = self.form.counts
      config = self._judging(seed, prompts=min(48, self.form.prompts))
      found = best_of_n(
        config, scorer["model_dir"], counts, answers=4 * max(counts)
      )
      known[str(seed)] = [x._asdict() for x in found]
      self._write()
    return known[str(seed)]

  def config(self, job: Job) -> Config:
    """Of a run."""
    pairs = job.pairs or self.form.pairs
    made = compare_methods.get_config(
      f"method={job.method},dial={job.dial},seed={job.seed},pairs={pairs},"
      f"budget={self.form.budget},root={self.root}"
    )
    if job.method == "sft":
      made.train.steps = self.form.sft_steps
      made.model.width, made.model.layers = self.form.width, self.form.layers
    return from_dict(made.to_dict())

  def _judging(self, seed: int, prompts: int = 0) -> Config:
    made = compare_methods.get_config(
      f"method=judge,seed={seed},root={self.root}"
    )
    made.sample.prompts = prompts or self.form.prompts
    return from_dict(made.to_dict())

  def _data(self, job: Job) -> None:
    folder = self.root / "data" / f"seed{job.seed}n{job.pairs}"
    if job.pairs and not folder.exists():
      write_tastes(folder, pairs=job.pairs, seed=job.seed)

  def _write(self) -> None:
    text = json.dumps(self.judged, indent=1)
    self._file.write_text(text + "\n")


# Of a form, what makes a run of one name another.
_DECISIVE = (
  "pairs", "budget", "counts", "prompts", "sft_steps", "width", "layers",
)  # fmt: skip


def settings(config: Config) -> list[str]:
  """The settings of a run that are not their defaults, paths and all."""
  mine, usual = (flatten(c.to_dict()) for c in (config, Config()))
  return sorted(
    k for k, v in mine.items() if v is not None and v != usual.get(k)
  )


def responses(config: Config) -> int:
  """How many pass a gradient through a model, over all steps; one that trains
  two models counts twice."""
  t, o = config.train, config.online
  if not o.method:
    each = 2 if config.make_loss().kind == "paired" else 1
    return t.steps * t.batch_size * each
  group = {"ppo": 2 * o.group, "grpo": o.group, "pairs": 2}[o.method]
  return t.steps * t.batch_size * group * o.epochs
