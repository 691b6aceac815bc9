"""Reward models against transformers' sequence classification, both ways, with
weights drawn anew: scores of packed pairs, and a step of training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from dpo_jax import losses
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  token_cost,
)
from dpo_jax.models import hf
from dpo_jax.reward_score import RewardScore
from dpo_jax.train_step import train_step
from dpo_jax.update import TrainState

from .live import WHY, hf_config, load, rng
from .test_hf_live import BY_FAMILY, CHECKPOINTS

torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]

PAIRS, PAD = 5, 0


def drawn(rng, kind, **changes):
  """A random reward model of transformers."""
  config = hf_config(rng, **CHECKPOINTS[kind] | changes, num_labels=1)
  model = transformers.AutoModelForSequenceClassification.from_config(
    config, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim == 1 and "norm" in name:
        p.normal_(0.0 if "gemma" in config.model_type else 1.0, 0.2)
  return model


def draw_pairs(rng, vocabulary):
  """Prompts, and two responses to each; no token is the padding one."""
  ids = lambda: rng.integers(3, vocabulary, rng.integers(1, 30)).tolist()
  return [(ids(), ids(), ids()) for _ in range(PAIRS)]


def our_batch(pairs):
  """All pairs in one row; a closing token follows each response."""
  examples = [
    Example(*(np.array(x, np.int32) for x in (prompt, *([*r, 1] for r in two))))
    for prompt, *two in pairs
  ]
  costs = [token_cost(*map(len, x[:3])) for x in examples]
  scored = sum(len(x.first) + len(x.second) for x in examples)
  batch = empty_batch(1, RowShape(sum(costs) + 3, scored + 2, PAIRS))
  fill_row(batch, 0, examples)
  return batch


def their_scores(model, pairs):
  """f32[PAIRS 2], each sequence padded on the right."""
  rows = [prompt + r for prompt, *two in pairs for r in two]
  longest = max(map(len, rows))
  ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
  mask = torch.tensor([
    [1] * len(row) + [0] * (longest - len(row)) for row in rows
  ])  # fmt: skip
  return model(ids, attention_mask=mask).logits.reshape(PAIRS, 2)


@pytest.mark.parametrize("kind", [*BY_FAMILY, "tied", "gemma2_odd"])
def test_scores_are_theirs_on_their_weights_and_ours_on_ours(
  rng, tmp_path, kind
):
  theirs = drawn(rng, kind)
  theirs.save_pretrained(tmp_path / "theirs")
  model, variables = load(tmp_path / "theirs")
  assert model.config.scalar_head and "unembed" not in variables["params"]
  pairs = draw_pairs(rng, theirs.config.vocab_size)
  batch = our_batch(pairs)
  (scores,) = jax.jit(RewardScore(model))(variables, batch).logps
  with torch.no_grad():
    wanted = their_scores(theirs, pairs).numpy()
  assert wanted.std() > 1e-2
  np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)
  module, config = hf.read_config(tmp_path / "theirs")
  hf.save_checkpoint(
    tmp_path / "ours", module, config, variables,
    entries={"pad_token_id": PAD},
  )  # fmt: skip
  auto = transformers.AutoModelForSequenceClassification
  again, info = auto.from_pretrained(
    tmp_path / "ours", dtype=torch.float32, output_loading_info=True,
    attn_implementation="eager",
  )  # fmt: skip
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert type(again) is type(theirs) and again.config.num_labels == 1
  with torch.no_grad():
    np.testing.assert_array_equal(
      their_scores(again.eval(), pairs).numpy(), wanted
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_models_folder_begins_with_its_hidden_states(
  rng, tmp_path, tied
):
  """Their reward model of the same folder, and our head, give our scores."""
  config = hf_config(rng, tie_word_embeddings=tied)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
    tmp_path
  )
  module, shape = hf.read_config(tmp_path)
  model = module.Model(dataclasses.replace(shape, scalar_head=True))
  head = rng.normal(size=(1, shape.width)).astype("f4")
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
  del abstract["score"]
  variables = hf.load_variables(
    tmp_path, module.HF_NAMES, {"params": dict(abstract)}
  )
  variables["params"]["score"] = jnp.asarray(head)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path, num_labels=1, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    theirs.score.weight.copy_(torch.tensor(head))
    pairs = draw_pairs(rng, shape.vocab_size)
    wanted = their_scores(theirs, pairs).numpy()
  batch = our_batch(pairs)
  (scores,) = jax.jit(RewardScore(model))(variables, batch).logps
  np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama3", "qwen3", "gemma2"])
def test_a_step_moves_every_weight_as_theirs(rng, tmp_path, kind):
  rate, centering = 0.1, 0.01
  theirs = drawn(rng, kind)
  theirs.save_pretrained(tmp_path / "before")
  model, variables = load(tmp_path / "before")
  pairs = draw_pairs(rng, theirs.config.vocab_size)
  tx = optax.sgd(rate)
  state = TrainState(jnp.int32(0), variables, tx.init(variables), jnp.int32(0))
  state, sums = train_step(
    state, None, our_batch(pairs), score=RewardScore(model), tx=tx,
    loss=losses.make("reward", centering=centering),
  )  # fmt: skip
  optimizer = torch.optim.SGD(theirs.parameters(), lr=rate)
  chosen, rejected = their_scores(theirs, pairs).unbind(1)
  loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
  loss = loss + centering * ((chosen + rejected) ** 2).mean()
  loss.backward()
  optimizer.step()
  np.testing.assert_allclose(float(sums["loss"].mean()), loss.item(), rtol=1e-5)
  module, config = hf.read_config(tmp_path / "before")
  hf.save_checkpoint(tmp_path / "after", module, config, state.params)
  after = load_file(tmp_path / "after" / "model.safetensors")
  before = load_file(tmp_path / "before" / "model.safetensors")
  wanted = {k: p.detach().numpy() for k, p in theirs.named_parameters()}
  assert sorted(after) == sorted(wanted)
  largest = max(np.abs(wanted[k] - before[k]).max() for k in wanted)
  for name, array in after.items():
    np.testing.assert_allclose(
      array - before[name], wanted[name] - before[name],
      rtol=1e-3, atol=1e-5 * largest + 1e-7, err_msg=name,
    )  # fmt: skip
