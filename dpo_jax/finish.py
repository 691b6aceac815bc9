"""The end of a run: answers, exported model, summary and report."""

import importlib.metadata
import sys
from typing import Any

import jax
import numpy as np

from dpo_jax import metrics, processes, trainable
from dpo_jax.answers import Answerer, Answers
from dpo_jax.build import config_entries
from dpo_jax.config import flatten
from dpo_jax.files import cannot_write
from dpo_jax.models import hf, lora, peft
from dpo_jax.report import write_report
from dpo_jax.run import Run
from dpo_jax.update import TrainState, Variables
from dpo_jax.workdir import Workdir
from dpo_jax.writers import encode_float, read_metrics

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "dpo-jax")


def finish(
  run: Run,
  place: Workdir,
  state: TrainState,
  policy: Variables,
  reference: Variables | None,
  answerer: Answerer | None,
  seconds: float,
) -> dict[str, Any]:
  """Writes samples.jsonl, model/, adapter/, report.html and, as the sign that
  all of them are there, summary.json.

  Returns:
    The summary.

  Raises:
    DataError: one of them cannot be written.
  """
  rewards = kl = None
  if answerer:
    after = answerer(policy)
    rewards = processes.lead(lambda: _write_answers(place, run.steps, after))
    if reference is not None:
      kl = answerer.kl(policy, reference, after.sampled)
  calibrated = None
  if run.loss.needs_scores and run.eval_plan is not None:
    found = run.evaluator(policy, None, run.eval_plan, state.loss_state)
    calibrated = found.calibration
  if run.config.train.export:
    try:
      _export(run, place, policy)
    except OSError as e:
      raise cannot_write(e.filename or place.model, e) from e

  def conclude() -> dict[str, Any]:
    summary = _summary(run, place, state, policy, seconds)
    summary |= {"true_reward": rewards, "kl_to_reference": kl and kl["mean"]}
    if calibrated:
      summary["calibration"] = calibrated
    if kl:
      summary["kl_standard_error"] = kl["standard_error"]
    write_report(place.path, _finite(summary))
    place.write_json(place.summary, _finite(summary))
    return summary

  return processes.lead(conclude)


def _write_answers(
  place: Workdir, step: int, after: Answers
) -> dict[str, float] | None:
  """Adds the answers after training to those before; returns the mean rewards,
  where there are any."""
  rows, rewards = place.read_samples(), after.rewards
  for row, response, reward in zip(
    rows, after.responses, rewards or [None] * len(rows), strict=True
  ):
    row |= {"step": step, "after": response, "reward_after": reward}
  place.write_jsonl(place.samples, rows)
  if not rewards:
    return None
  before = [row["reward_before"] for row in rows]
  return {"before": float(np.mean(before)), "after": float(np.mean(rewards))}


def _export(run: Run, place: Workdir, policy: Variables) -> None:
  """The whole model, adapters merged; the adapters beside it as well, but for a
  reward model's, which are nothing without its head. Adapters of a base in few
  bits stay alone: they go with the base as it was."""
  built, options = run.built, {}
  if built.lora:
    adapters = processes.gather(policy["lora"])
    options["transform"] = lora.merger(adapters)
    base = run.config.model.path
    names = built.family.HF_NAMES
    if processes.leads() and _exports_adapter(run):
      peft.save(place.adapter, names, adapters, built.lora, base)
  if run.config.model.quantize:
    return
  hf.save_checkpoint(
    place.model,
    built.family,
    built.model.config,
    policy,
    save_tokenizer=built.tokenizer.save,
    entries=config_entries(built),
    **options,
  )


def _exports_adapter(run: Run) -> bool:
  return bool(run.built.lora) and not run.loss.needs_scores


def _summary(run, place, state, policy, seconds) -> dict[str, Any]:
  config = run.config
  rows = read_metrics(place.metrics)
  evals = [r for r in rows if r["split"] == "eval"]
  train = [r for r in rows if r["split"] == "train"]
  reports = run.data.reports
  plan = run.train_plan
  return {
    "method": run.method,
    "loss": dict(run.loss.options),
    "model": config.model.path or f"{config.model.family} from scratch",
    "parameters": trainable.count(policy["params"]),
    "trained_parameters": trainable.count(state.params),
    "dataset": reports["train"],
    "eval_dataset": reports.get("eval"),
    "eval_examples": len(run.data.held_out) if run.data.held_out else 0,
    "steps": run.steps,
    "batch_size": config.train.batch_size,
    "row_tokens": plan.shapes[-1].row.tokens,
    "fill": plan.fill(),
    "scored_fill": plan.scored_fill(),
    "wall_seconds": seconds,
    "throughput": metrics.speed(train),
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "versions": {
      "python": sys.version.split()[0],
      **{name: _version(name) for name in _PACKAGES},
    },
    "initial_eval": _metrics(evals[0]) if evals else None,
    "final_eval": _metrics(evals[-1]) if evals else None,
    "skipped_steps": int(state.skipped),
    "checkpoint": str(place.checkpoints),
    "report": str(place.report),
    "model_dir": str(place.model)
    if config.train.export and not config.model.quantize
    else None,
    "adapter_dir": str(place.adapter)
    if config.train.export and _exports_adapter(run)
    else None,
    "command": " ".join(sys.argv),
    "config": flatten(config.to_dict()),
  }


def _metrics(row):
  return {k: v for k, v in row.items() if k not in ("step", "split")}


def _finite(value):
  """Strict JSON: non-finite floats become strings, as in metrics.jsonl."""
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  return encode_float(value) if isinstance(value, float) else value


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"
