"""What a run would do, without doing it: shapes, memory, and the first row."""

from typing import Any

import jax
import numpy as np

from dpo_jax import memory, trainable
from dpo_jax.config import Config, flatten
from dpo_jax.online import OnlineRun, make_run


def render_config(config: Config) -> str:
  """All settings, one a line, as they are given on the command line."""
  lines = [
    f"--config.{key}={value!r}"
    for key, value in flatten(config.to_dict()).items()
    if value is not None
  ]
  return "\n".join(lines)


def describe(config: Config) -> str:
  """Builds everything but the weights, compiles the step, runs none of it. Of
  an online run, whose rows are not known before, it compiles nothing."""
  run = make_run(config)
  built, plan = run.built, run.train_plan
  n_params = trainable.count(built.abstract["params"])
  trained, _ = run.trainable.split(built.abstract)
  reads = "with a reference" if run.loss.needs_reference else "no reference"
  held_out = len(run.data.held_out) if run.data.held_out else 0
  lines = [
    f"loss        {run.method} {dict(run.loss.options)}, {reads}",
    f"model       {config.model.path or 'from scratch'}, {n_params:,}"
    f" parameters, {trainable.count(trained):,} of them trained,"
    f" {config.model.dtype}",
    f"mesh        {dict(built.mesh.shape)} on {jax.device_count()} x"
    f" {jax.devices()[0].device_kind}",
    f"data        {run.data.train.format}: {len(run.data.train)} examples to"
    f" train, {held_out} held out",
    f"dropped     {run.data.reports['train'].get('dropped') or 'none'}",
    f"changed     {run.data.reports['train'].get('changed') or 'none'}",
    f"steps       {run.steps} of {plan.batch_size} examples",
    *plan.describe(),
  ]
  if isinstance(run, OnlineRun):
    return "\n".join(lines)
  memory.fit(run)
  batch, _ = plan[0]
  lines += [
    f"work        {run.ideal_flops(1) / 1e9:,.4g} GFLOP of products for the"
    f" {plan.tokens(0):,} tokens of step 1, at least",
    *memory.render(memory.held(run)),
    f"remat       {run.built.model.compute.remat}",
    "row 0",
    render_row(batch, 0, built.tokenizer),
  ]
  return "\n".join(lines)


def render_row(batch: Any, row: int, tokenizer: Any) -> str:
  """One packed row, token by token: what it is, where it stands, what it sees
  and what it must predict."""
  used = batch.key_end[row] > 0
  predicts = {}
  branches = batch.lengths.shape[2]
  empty = branches * batch.weights.shape[1]
  names = ("first", "second", *map(str, range(3, branches + 1)))
  for source, target, slot in zip(
    batch.source[row], batch.target[row], batch.slot[row], strict=True
  ):
    if slot < empty:
      predicts[int(source)] = (int(slot), int(target))
  lines = [
    " index  position  sees            example branch    token -> target"
  ]
  for i in np.flatnonzero(used):
    slot, target = predicts.get(int(i), (None, None))
    where = "prompt"
    if slot is not None:
      where = f"{slot // branches}: {names[slot % branches]}"
    text = repr(tokenizer.decode([int(batch.tokens[row, i])]))
    if target is not None:
      text += f" -> {tokenizer.decode([target])!r}"
    sees = f"[{batch.key_start[row, i]}, {batch.key_end[row, i]})"
    lines.append(
      f"{i:6d}  {batch.positions[row, i]:8d}  {sees:14s}  {where:16s}  {text}"
    )
  lines.append(f"{int((~used).sum())} tokens of padding")
  return "\n".join(lines)


def render_summary(summary: dict[str, Any]) -> str:
  """A finished run in a few lines."""
  lines = [f"{summary['method']}: {summary['steps']} steps done"]
  before, after = summary.get("initial_eval"), summary.get("final_eval")
  if before and after:
    for key, name in (
      ("objective/scores", "held-out reward"),
      ("objective/kl", "held-out KL"),
      ("loss", "held-out loss"),
      ("rewards/accuracies", "held-out accuracy"),
      ("rewards/margins", "held-out margin"),
      ("calibration_error", "calibration error"),
    ):
      if key in after:
        # Of a finished run they come from a file, non-finite ones as text.
        first, last = float(before[key]), float(after[key])
        lines.append(f"  {name:18s} {first:.4f} -> {last:.4f}")
  if summary.get("true_reward"):
    reward = summary["true_reward"]
    lines.append(
      f"  {'true reward':18s} {reward['before']:.3f} -> {reward['after']:.3f}"
    )
  if summary.get("kl_to_reference") is not None:
    lines.append(
      f"  {'KL to reference':18s} {summary['kl_to_reference']:.2f} +-"
      f" {summary['kl_standard_error']:.2f} nats a response, estimated"
    )
  for key, name in (("model_dir", "model"), ("report", "report")):
    if summary.get(key):
      lines.append(f"  {name:18s} {summary[key]}")
  return "\n".join(lines)
