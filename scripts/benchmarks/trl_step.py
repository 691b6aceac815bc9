"""TRL's DPOTrainer on the same weights and tokens, in its own training loop."""

import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks.problem import Problem

Pause = Callable[[dict[str, Any]], None]


def trl(
  problem: Problem,
  path: str,
  pause: Pause,
  checkpointing: bool = False,
  device: str = "cpu",
) -> None:
  """Runs `DPOTrainer.train`, calling `pause` when ready and after each step.

  All settings are TRL's own but these: the problem's dtype, for weights,
  optimizer and activations; a constant learning rate; batches in order; and,
  unless `checkpointing`, no gradient checkpointing, which is TRL's default and
  costs it another forward. On a GPU attention is flash attention where that is
  installed, else sdpa, its default.
  """
  make_trainer(problem, path, pause, checkpointing, device).train()


def make_trainer(problem, path, pause, checkpointing, device="cpu"):
  """A trainer that calls `pause(row)` before its first and after each step."""
  import torch
  import transformers
  from datasets import Dataset
  from trl import DPOConfig, DPOTrainer

  class Paused(DPOTrainer):
    """Measures nothing itself; keeps the loss for whoever does."""

    def _prepare_dataset(self, dataset, *_):
      return dataset  # token ids already

    def training_step(self, *args, **kwargs):
      loss = super().training_step(*args, **kwargs)
      self.last = {
        "loss": float(loss),
        "logps": self._metrics["train"]["logps/chosen"][-1],
      }
      return loss

  class Turns(transformers.TrainerCallback):
    def on_train_begin(self, *_, **__):
      name = torch.cuda.get_device_name() if on_gpu else "cpu"
      pause({"device": name})

    def on_step_end(self, *_, **__):
      peak = None
      if on_gpu:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
      pause(trainer.last | {"device_peak": peak})

  on_gpu = device == "gpu"
  pairs = [pair for batch in problem.draw() for pair in batch]
  columns = zip(*pairs, strict=True)
  names = "prompt_ids", "chosen_ids", "rejected_ids"
  data = Dataset.from_dict(
    {
      name: [ids.tolist() for ids in column]
      for name, column in zip(names, columns, strict=True)
    }
  )
  args = DPOConfig(
    output_dir=f"{path}/trl",
    per_device_train_batch_size=problem.pairs,
    train_sampling_strategy="sequential",
    max_steps=1_000_000,
    learning_rate=problem.learning_rate,
    lr_scheduler_type="constant",
    beta=problem.beta,
    max_length=None,
    bf16=problem.dtype == "bfloat16",
    gradient_checkpointing=checkpointing,
    use_cpu=not on_gpu,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    logging_strategy="no",
    seed=problem.seed,
  )
  flash = on_gpu and importlib.util.find_spec("flash_attn") is not None

  def load():
    return transformers.AutoModelForCausalLM.from_pretrained(
      path,
      dtype=getattr(torch, problem.dtype),
      attn_implementation="flash_attention_2" if flash else "sdpa",
      device_map="cuda" if on_gpu else None,
    )

  adapters = {}
  if problem.lora:
    import peft

    adapters["peft_config"] = peft.LoraConfig(
      r=problem.lora,
      lora_alpha=16,  # as of `dpo_jax.models.lora.Lora`
      target_modules="all-linear",
      task_type="CAUSAL_LM",
    )
  trainer = Paused(
    model=load(),
    ref_model=None if adapters else load(),
    args=args,
    train_dataset=data,
    processing_class=tokenizer(problem.vocab),
    callbacks=[Turns()],
    **adapters,
  )
  return trainer


def tokenizer(vocab: int):
  """The trainer wants one; nothing is ever tokenised."""
  import tokenizers
  import transformers

  words = {f"<{i}>": i for i in range(vocab)}
  model = tokenizers.models.WordLevel(words, unk_token="<0>")
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(model),
    pad_token="<0>",
    eos_token="<1>",
  )
