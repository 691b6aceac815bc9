"""The balancing loss of a mixture of experts against that of transformers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import moe

from .live import WHY, hf_config, hf_model, load, rng

torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]

KINDS = {
  "mixtral": {"family": "mixtral", "num_experts_per_tok": 2},
  "qwen3_moe": {
    "family": "qwen3_moe", "num_experts_per_tok": 3, "head_dim": 8,
    "moe_intermediate_size": 24, "norm_topk_prob": True,
  },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_balancing_loss_of_padded_rows(rng, tmp_path, kind):
  changes = KINDS[kind] | {"num_local_experts": 5, "num_hidden_layers": 3}
  theirs = hf_model(hf_config(rng, **changes))
  theirs.save_pretrained(tmp_path)
  model, variables = load(tmp_path)
  ids = rng.integers(3, theirs.config.vocab_size, (4, 40))
  lengths = np.array([40, 1, *rng.integers(2, 40, 2)])
  there = np.arange(40) < lengths[:, None]
  index = jnp.broadcast_to(jnp.arange(40), ids.shape)
  _, sown = model.apply(
    variables, ids, index, index * 0, jnp.where(there, index + 1, 0),
    mutable=["router"],
  )  # fmt: skip
  sums = {name: x for name, (x,) in sown["router"].items()}
  np.testing.assert_array_equal(sums["tokens"], 3 * lengths)
  with torch.no_grad():
    out = theirs(
      torch.tensor(ids), attention_mask=torch.tensor(there.astype(int)),
      output_router_logits=True,
    )  # fmt: skip
  np.testing.assert_allclose(moe.balance(**sums), out.aux_loss, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_and_its_gradient(rng, kind):
  """From the same router logits, in float32; rows that are all padding too."""
  layers, rows, length, experts, k = 2, 3, 7, 5, 2
  logits = rng.normal(size=(layers, rows, length, experts)).astype(np.float32)
  there = rng.random((rows, length)) < 0.7
  there[0], there[1] = True, False

  def ours(logits):
    probs = jax.nn.softmax(logits)
    _, chosen = jax.lax.top_k(probs, k)
    votes = (chosen[..., None] == jnp.arange(experts)).sum(axis=3)
    mask = there[None, ..., None]
    load, mass = ((x * mask).sum(axis=(0, 2)) for x in (votes, probs))
    return moe.balance(load, mass, layers * there.sum(axis=1))

  module = importlib.import_module(
    f"transformers.models.{kind}.modeling_{kind}"
  )
  leaf = torch.tensor(logits, requires_grad=True)
  gates = tuple(x.reshape(-1, experts) for x in leaf)
  loss = module.load_balancing_loss_func(
    gates, experts, k, torch.tensor(there.astype(int))
  )
  loss.backward()
  value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
  np.testing.assert_allclose(value, loss.detach(), rtol=1e-5)
  np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-7)
