"""Three steps of TRL's DPOTrainer and of ours, from one checkpoint, over the
same tokens; ours packed, theirs padded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, optim
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  first_fit_decreasing,
  token_cost,
)
from dpo_jax.score import make_score
from dpo_jax.train_step import TrainState, train_step

from .live import (
  LLAMA3,
  WHY,
  hf_config,
  hf_model,
  load,
  our_logits,
  rng,
  their_logits,
)

torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
trl = pytest.importorskip("trl", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]


def _train_trl(path, examples, pairs, options, beta):
  import datasets
  import tokenizers

  class Recording(trl.DPOTrainer):
    """Takes tokens as they are, in their order, and keeps losses."""

    losses: list

    def _prepare_dataset(self, dataset, *_):
      return dataset

    def _get_train_sampler(self, *_):
      return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
      loss = super().training_step(*args, **kwargs)
      self.losses.append(float(loss))
      return loss

  def read():
    return transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32
    )

  words = tokenizers.models.WordLevel(
    {f"<{i}>": i for i in range(8)}, unk_token="<3>"
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words),
    pad_token="<0>",
    eos_token="<2>",
  )
  names = ("prompt_ids", "chosen_ids", "rejected_ids")
  trainer = Recording(
    model=read(),
    ref_model=read(),
    args=trl.DPOConfig(
      output_dir=f"{path}/out", per_device_train_batch_size=pairs,
      num_train_epochs=1, lr_scheduler_type="constant", beta=beta,
      max_length=None, bf16=False, use_cpu=True, report_to=[],
      save_strategy="no", disable_tqdm=True, logging_strategy="no", **options,
    ),
    train_dataset=datasets.Dataset.from_dict(
      {n: [e[i].tolist() for e in examples] for i, n in enumerate(names)}
    ),
    processing_class=tokenizer,
  )  # fmt: skip
  trainer.losses = []
  trainer.train()
  return trainer.losses, trainer.model


def _pack(examples):
  cost = [token_cost(*map(len, e[:3])) for e in examples]
  scored = [len(e.first) + len(e.second) for e in examples]
  shape = RowShape(2 * max(cost), 2 * max(scored), 3)
  rows = first_fit_decreasing(cost, scored, shape)
  batch = empty_batch(len(rows), shape)
  for row, places in enumerate(rows):
    fill_row(batch, row, (examples[i] for i in places))
  assert len(rows) < len(examples)  # some pairs share a row
  return jax.tree.map(jnp.asarray, batch)


def test_training_steps(rng, tmp_path):
  config = hf_config(rng, rope_parameters=LLAMA3, attention_bias=True)
  hf_model(config).save_pretrained(tmp_path)
  pairs, steps = 6, 3

  def tokens(low, high):
    n = int(rng.integers(low, high))
    return rng.integers(3, config.vocab_size, n).astype(np.int32)

  examples = [
    Example(tokens(1, 30), tokens(1, 20), tokens(1, 20))
    for _ in range(pairs * steps)
  ]
  beta = float(rng.uniform(0.05, 0.5))
  options = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
  theirs, trained = _train_trl(str(tmp_path), examples, pairs, options, beta)

  model, params = load(tmp_path)
  _, reference = load(tmp_path)
  tx = optim.make(
    optax.constant_schedule(1e-3), weight_decay=0.1, clip_norm=1.0
  )
  zero = jnp.int32(0)
  state = TrainState(zero, params, tx.init(params), zero)
  ours = []
  for step in range(steps):
    batch = _pack(examples[step * pairs : (step + 1) * pairs])
    state, sums = train_step(
      state, reference, batch, score=make_score(model),
      loss=losses.make("dpo", beta=beta), tx=tx,
    )  # fmt: skip
    ours.append(float(sums["loss"].mean()))

  assert abs(ours[0] - np.log(2)) < 1e-6 and abs(ours[2] - ours[0]) > 1e-3
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  ids = rng.integers(0, config.vocab_size, (2, 40))
  np.testing.assert_allclose(
    our_logits(model, state.params, ids), their_logits(trained.eval(), ids),
    rtol=1e-2, atol=1e-2,
  )  # fmt: skip
