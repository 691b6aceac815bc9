"""Judges a checkpoint against its reference on preference data."""

import dataclasses
import logging
import os
from typing import Any

from dpo_jax import calibration, evaluate, losses, sharding
from dpo_jax.answers import Answerer, distinct_prompts
from dpo_jax.build import build, load_data
from dpo_jax.config import Config
from dpo_jax.data.plan import Plan
from dpo_jax.errors import ConfigError
from dpo_jax.models import hf
from dpo_jax.weights import (
  load_policy,
  load_variables,
  refuse_new_adapters,
  same_path,
)

_LOG = logging.getLogger("dpo_jax")


def judge(config: Config) -> dict[str, Any]:
  """Scores all examples of `config.data.source` once.

  Args:
    config: `model.path` is judged; `reference.path` is what its log-ratios are
      taken against (needed by a loss that reads a reference); `data.eval_rows`
      limits the rows; `sample` says how many answers estimate the KL.

  Returns:
    {"loss", "examples", "metrics", "subsets", "kl", "calibration"}: means over
    all examples, the same accuracy by subset with 95 % intervals, KL(policy ||
    reference) in nats per response with its standard error, and of a reward
    model what `calibration.calibration` gives.

  Raises:
    UserError: one line for what is missing or does not fit.
  """
  if not config.model.path:
    raise ConfigError("config.model.path is empty; name the model to judge")
  loss = config.make_loss()
  if loss.needs_reference and not config.reference.path:
    raise ConfigError(
      f"loss {loss.name!r} compares with a reference; name what the policy"
      " started from in config.reference.path"
    )
  if loss.needs_scores:
    _check_reward_model(config, loss)
  if loss.initial_state() is not None:
    _LOG.warning(
      "the running mean of %r is not part of a model folder and starts at 0",
      loss.name,
    )
  limit = config.data.eval_rows
  data = dataclasses.replace(config.data, eval_rows=0, eval_source="")
  refuse_new_adapters(config)
  built = build(config)
  loaded = load_data(dataclasses.replace(config, data=data), built, loss, limit)
  examples = loaded.train
  plan = Plan(
    examples,
    batch_size=config.train.eval_batch_size or config.train.batch_size,
    shuffle=False,
    row_length=config.data.row_length,
    rows_multiple=sharding.batch_shards(built.mesh),
    scored_multiple=8 * built.mesh.shape["tensor"],
    mismatch=loss.mismatches,
  )
  policy = load_policy(config, built)
  reference = None
  if same_path(config.reference.path, config.model.path):
    reference = {"params": policy["params"]}
  elif config.reference.path:
    reference = load_variables(
      config, built, config.reference.path, on_host=config.offload.reference
    )
  evaluator = evaluate.make_evaluator(built.score, loss, built.mesh)
  result = evaluator(policy, reference, plan)
  kl = None
  if reference is not None and config.sample.prompts:
    prompts = distinct_prompts(examples, config.sample.prompts)
    answerer = Answerer(built, config.sample, prompts, config.seed)
    kl = answerer.kl(policy, reference, answerer(policy).sampled)
  subsets = {}
  if loss.kind == "paired":
    subsets = evaluate.by_subset(result, examples, loss)
  return {
    "model": config.model.path,
    "reference": config.reference.path or None,
    "source": config.data.source,
    "loss": loss.name,
    "options": dict(loss.options),
    "examples": len(examples),
    "examples_there": loaded.reports["train"]["examples"],
    "metrics": result.means,
    "subsets": subsets,
    "calibration": result.calibration,
    "kl": kl,
    "data": examples.report,
  }


def _check_reward_model(config: Config, loss: losses.Loss) -> None:
  """Raises ConfigError for a model without scores, or one beside it."""
  _, shape = hf.read_config(os.path.expanduser(config.model.path))
  if not shape.scalar_head:
    raise ConfigError(
      f"loss {loss.name!r} reads scores of a reward model, and"
      f" {config.model.path} is a language model"
    )
  if config.reference.path:
    raise ConfigError(
      f"config.reference.path={config.reference.path!r}: loss {loss.name!r}"
      " compares with no reference"
    )


def render(result: dict[str, Any]) -> str:
  """The result of `judge` as lines to read."""
  used, there = result["examples"], result["examples_there"]
  part = f" of {there} (--config.data.eval_rows=0 takes all)"
  lines = [
    f"{result['loss']} {result['options']}",
    f"{result['model']} against {result['reference'] or 'no reference'}:"
    f" {used}{part if used < there else ''} examples of {result['source']}",
  ]
  lines += [f"  {k:20s} {v:10.4f}" for k, v in result["metrics"].items()]
  if result["kl"]:
    kl = result["kl"]
    lines.append(
      f"  {'KL, nats a response':20s} {kl['mean']:10.4f} +- "
      f"{kl['standard_error']:.4f}"
    )
  for name, row in result["subsets"].items():
    low, high = row["interval"]
    margin = f"log-ratio margin {row.get('logratio_margin', 0):.4f}"
    if "score_margin" in row:
      margin = f"score margin {row['score_margin']:.4f}"
    lines.append(
      f"  {name:20s} accuracy {row['accuracy']:.4f} [{low:.4f}, {high:.4f}]"
      f"  {margin}  n={row['examples']}"
    )
  if result["calibration"]:
    lines += calibration.render(result["calibration"])
  return "\n".join(lines)
