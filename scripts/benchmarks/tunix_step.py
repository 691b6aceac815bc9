"""Tunix's DPOTrainer on the same weights and tokens, in its own loop."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft.dpo.dpo_trainer import (
  DPOTrainer,
  DPOTrainingConfig,
  TrainingInput,
)

from benchmarks.problem import ROPE_THETA, Pair, Problem

Pause = Callable[[dict[str, Any]], None]


def tunix(problem: Problem, path: str, pause: Pause) -> None:
  """Runs `DPOTrainer.train`, calling `pause` when ready and after each step.

  Prompts are padded on the left and responses on the right, to the longest of
  all batches, since the trainer compiles for one shape; the optimizer is the
  one of `dpo_jax.optim` at its defaults.
  """
  if problem.lora:
    raise ValueError("tunix has no adapters in this benchmark")
  config = llama3.ModelConfig(
    num_layers=problem.layers,
    vocab_size=problem.vocab,
    embed_dim=problem.width,
    hidden_dim=problem.ffn,
    num_heads=problem.heads,
    head_dim=problem.width // problem.heads,
    num_kv_heads=problem.kv_heads or problem.heads,
    rope_theta=ROPE_THETA,
    norm_eps=1e-5,
    weight_tying=problem.tied,
  )

  def load():
    dtype = jax.numpy.dtype(problem.dtype)
    return params.create_model_from_safe_tensors(path, config, dtype=dtype)

  trainer = _Paused(
    load(),
    load(),
    optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(problem.learning_rate, weight_decay=0.0),
    ),
    DPOTrainingConfig(eval_every_n_steps=10**9, beta=problem.beta),
  )
  trainer.train(_steps(problem, trainer, pause))


class _Paused(DPOTrainer):
  """Measures nothing itself; keeps the loss for whoever does."""

  def _post_process_train_step(self, aux):
    self.last = self._buffered_train_metrics.losses[-1], aux
    super()._post_process_train_step(aux)


def _steps(
  problem: Problem, trainer: _Paused, pause: Pause
) -> Iterator[TrainingInput]:
  """The batches, for ever; asked for the next one, a step is over."""
  longest = np.array(problem.lengths).max(axis=0)
  inputs = [_padded(batch, longest) for batch in problem.draw()]
  pause({"device": jax.devices()[0].device_kind})
  for batch in itertools.cycle(inputs):
    yield batch
    loss, aux = trainer.last
    jax.block_until_ready((nnx.state(trainer.model), trainer.last))
    stats = jax.devices()[0].memory_stats() or {}
    pause({
      "loss": float(loss),
      "logps": float(aux["log_probs/chosen"]),
      "device_peak": stats.get("peak_bytes_in_use"),
    })  # fmt: skip


def _padded(batch: list[Pair], longest: np.ndarray) -> TrainingInput:
  """Token ids and masks [B n] of prompts, chosen and rejected responses."""
  fields = {}
  names, sides = ("prompt", "chosen", "rejected"), ("left", "right", "right")
  # Chosen and rejected are stacked, so they are equally long.
  sizes = longest[0], max(longest[1:]), max(longest[1:])
  for column, name, side, size in zip(zip(*batch), names, sides, sizes):
    ids = np.zeros((len(column), size), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, tokens in enumerate(column):
      n = len(tokens)
      at = slice(size - n, size) if side == "left" else slice(0, n)
      ids[i, at], mask[i, at] = tokens, True
    fields |= {f"{name}_ids": ids, f"{name}_mask": mask}
  return TrainingInput(**fields)
