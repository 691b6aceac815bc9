"""Three steps of TRL's DPOTrainer and of ours, from one checkpoint, over the
same tokens; ours packed, theirs padded."""

import functools

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


def _pack(examples, steps):
  """A batch for every step, all of one shape."""
  cost = [token_cost(*map(len, e[:3])) for e in examples]
  scored = [len(e.first) + len(e.second) for e in examples]
  shape = RowShape(2 * max(cost), 2 * max(scored), 3)
  pairs = len(examples) // steps
  rows = [
    first_fit_decreasing(cost[i : i + pairs], scored[i : i + pairs], shape)
    for i in range(0, len(examples), pairs)
  ]
  most = max(map(len, rows))
  assert most < pairs  # some pairs share a row
  for step, of_step in enumerate(rows):
    batch = empty_batch(most, shape)
    for row, places in enumerate(of_step):
      fill_row(batch, row, (examples[step * pairs + i] for i in places))
    yield jax.tree.map(jnp.asarray, batch)


# Our loss, and what else differs here and in TRL's configuration.
CASES = {
  "dpo": ("dpo", {}, {}, {}),
  "ld": ("dpo", {"ld_alpha": 0.3}, {}, {"ld_alpha": 0.3}),
  "wpo": ("dpo", {"wpo": True}, {}, {"use_weighting": True}),
  "mixture": (
    "dpo+0.3*sft",
    {},
    {},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
  ),
  "moving_reference": (
    "dpo",
    {},
    {"sync_every": 2, "sync_mixup": 0.7},
    {
      "sync_ref_model": True, "ref_model_sync_steps": 2,
      "ref_model_mixup_alpha": 0.7,
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_three_steps_of_training_are_trls(rng, tmp_path, case):
  name, modifiers, moving, their_options = CASES[case]
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
  theirs, trained = _train_trl(
    str(tmp_path), examples, pairs, options | their_options, beta
  )

  model, params = load(tmp_path)
  _, reference = load(tmp_path)
  tx = optim.make(
    optax.constant_schedule(1e-3), weight_decay=0.1, clip_norm=1.0
  )
  zero = jnp.int32(0)
  state = TrainState(zero, params, tx.init(params), zero)
  if moving:
    state, reference = state._replace(reference=reference), None
  step = jax.jit(
    functools.partial(
      train_step, score=make_score(model), tx=tx,
      loss=losses.make(name, beta=beta, **modifiers), **moving,
    ),
    # Three steps: optimising them takes longer than running them.
    compiler_options={"xla_backend_optimization_level": 0},
  )  # fmt: skip
  ours = []
  for batch in _pack(examples, steps):
    state, sums = step(state, reference, batch)
    ours.append(float(sums["loss"].mean()))

  if case in ("dpo", "ld", "moving_reference"):
    assert abs(ours[0] - np.log(2)) < 1e-6
  assert np.ptp(ours) > 1e-4 * ours[0]
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  ids = rng.integers(0, config.vocab_size, (2, 40))
  np.testing.assert_allclose(
    our_logits(model, state.params, ids), their_logits(trained.eval(), ids),
    rtol=1e-2, atol=1e-2,
  )  # fmt: skip
