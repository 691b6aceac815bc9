"""EasyDeL's DPOTrainer on the same weights and tokens, in its own loop."""

from collections.abc import Callable
from typing import Any

import easydel
import jax
import numpy as np
from datasets import Dataset

from benchmarks.problem import Problem
from benchmarks.trl_step import tokenizer

Pause = Callable[[dict[str, Any]], None]


def easydel_step(problem: Problem, path: str, pause: Pause) -> None:
  """Runs `DPOTrainer.train`, calling `pause` when ready and after each step.

  Prompts are padded on the left and responses on the right, to the longest of
  all batches, since the trainer compiles for one shape. All settings are its
  own but these: one device, the optimizer of `dpo_jax.optim` at its defaults,
  and attention in the problem's dtype (its default is bfloat16).
  """
  if problem.lora:
    raise ValueError("easydel has no adapters in this benchmark")

  class Paused(easydel.DPOTrainer):
    """Measures nothing itself; stops between steps."""

    ready = False

    def on_step_start(self, state, step):
      if not self.ready:
        self.ready = True
        pause({"device": jax.devices()[0].device_kind})
      return super().on_step_start(state=state, step=step)

    def on_step_end(self, state, metrics, step):
      found = super().on_step_end(state=state, metrics=metrics, step=step)
      stats = jax.devices()[0].memory_stats() or {}
      pause({
        "loss": float(metrics.loss),
        "logps": None,
        "device_peak": stats.get("peak_bytes_in_use"),
      })  # fmt: skip
      return found

  def load():
    dtype = jax.numpy.dtype(problem.dtype)
    return easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
      path, dtype=dtype, param_dtype=dtype, from_torch=True,
      config_kwargs={"attn_dtype": dtype},
    )  # fmt: skip

  longest = np.array(problem.lengths).max(axis=0)
  prompt, response = int(longest[0]), int(max(longest[1:]))
  arguments = easydel.DPOConfig(
    save_directory=f"{path}/easydel",
    total_batch_size=problem.pairs,
    num_train_epochs=1,
    max_training_steps=100_000,
    learning_rate=problem.learning_rate,
    weight_decay=0.0,
    clip_grad=1.0,
    beta=problem.beta,
    max_prompt_length=prompt,
    max_completion_length=response,
    max_length=prompt + response,
    shuffle_train_dataset=False,
    do_last_save=False,
    save_optimizer_state=False,
    use_wandb=False,
    report_metrics=False,
    log_grad_norms=False,
  )
  trainer = Paused(
    arguments=arguments,
    model=load(),
    reference_model=load(),
    processing_class=tokenizer(problem.vocab),
    train_dataset=_dataset(problem),
  )
  trainer.train()


def _dataset(problem: Problem) -> Dataset:
  """All pairs, many times over: the trainer walks through them once."""
  pairs = [pair for batch in problem.draw() for pair in batch]
  columns = {}
  names = "prompt", "chosen", "rejected"
  for name, column in zip(names, zip(*pairs, strict=True), strict=True):
    columns[f"{name}_input_ids"] = [ids.tolist() for ids in column] * 50
    columns[f"{name}_attention_mask"] = [[1] * len(i) for i in column] * 50
  return Dataset.from_dict(columns)
