"""TRL's DPOTrainer on the same weights and tokens, in its own training loop."""

from collections.abc import Callable
from typing import Any

from benchmarks.problem import Problem

Pause = Callable[[dict[str, Any]], None]


def trl(
  problem: Problem, path: str, pause: Pause, checkpointing: bool = False
) -> None:
  """Runs `DPOTrainer.train`, calling `pause` when ready and after each step.

  All settings are TRL's own but these: float32 instead of bfloat16 (to
  compute the same numbers), a constant learning rate, and, unless
  `checkpointing`, no gradient checkpointing, which is TRL's default and costs
  it another forward.
  """
  make_trainer(problem, path, pause, checkpointing).train()


def make_trainer(problem, path, pause, checkpointing):
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
      self.last_loss = float(loss)
      return loss

  class Turns(transformers.TrainerCallback):
    def on_train_begin(self, *_, **__):
      pause({})

    def on_step_end(self, *_, **__):
      pause({"loss": trainer.last_loss})

  prompts, chosen, rejected = (x.tolist() for x in problem.draw())
  data = Dataset.from_dict(
    {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
  )
  args = DPOConfig(
    output_dir=f"{path}/trl",
    per_device_train_batch_size=problem.pairs,
    max_steps=1_000_000,
    learning_rate=problem.learning_rate,
    lr_scheduler_type="constant",
    beta=problem.beta,
    max_length=None,
    bf16=False,
    gradient_checkpointing=checkpointing,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    logging_strategy="no",
    seed=problem.seed,
  )

  def load():
    return transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32
    )

  trainer = Paused(
    model=load(),
    ref_model=load(),
    args=args,
    train_dataset=data,
    processing_class=_tokenizer(problem.vocab),
    callbacks=[Turns()],
  )
  return trainer


def _tokenizer(vocab: int):
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
