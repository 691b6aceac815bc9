"""Which tokens may be drawn, and how likely, as `generate` has it."""

import jax
import numpy as np
import pytest

from dpo_jax.decode import choose, truncated

from .live import WHY, rng

torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]
SETTINGS = [
  {"temperature": 0.7},
  {"top_k": 1},
  {"top_k": 7},
  {"top_k": 500},
  {"top_p": 0.5},
  {"top_p": 0.95},
  {"top_p": 1e-6},
  {"top_k": 12, "top_p": 0.8},
  {"temperature": 0.4, "top_k": 12, "top_p": 0.8},
  {"temperature": 2.5, "top_k": 40, "top_p": 0.6},
]


def theirs(logits, temperature=1.0, top_k=0, top_p=1.0):
  """Logits after the processors, in the order in which generate has them."""
  config = transformers.GenerationConfig(
    do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p
  )
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
      num_attention_heads=1,
    )
  )  # fmt: skip
  processors = model._get_logits_processor(
    config, input_ids_seq_length=1, device="cpu"
  )
  assert len(processors) == (temperature != 1) + (top_k > 0) + (top_p < 1)
  ids = torch.zeros((len(logits), 1), dtype=torch.long)
  return processors(ids, torch.tensor(logits)).numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_tokens_kept_are_theirs(rng, settings):
  logits = rng.normal(0, 2, (64, 90)).astype(np.float32)
  expected = theirs(logits, **settings)
  cuts = {"top_k": 0, "top_p": 1.0} | settings
  temperature = cuts.pop("temperature", 1.0)
  ours = np.asarray(truncated(logits / temperature, **cuts))
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
  there = np.isfinite(ours)
  np.testing.assert_allclose(ours[there], expected[there], rtol=1e-6)


def test_ties_with_the_last_of_k_stay_in_for_both():
  logits = np.array([[3.0, 1.0, 1.0, 0.0]], np.float32)
  for k in (1, 2, 3):
    ours = np.isfinite(np.asarray(truncated(logits, k, 1.0)))
    assert (ours == np.isfinite(theirs(logits, top_k=k))).all()


@pytest.mark.parametrize("settings", SETTINGS[-2:], ids=str)
def test_what_is_drawn_has_their_probabilities(rng, settings):
  logits = rng.normal(0, 2, (1, 40)).astype(np.float32)
  probs = torch.softmax(torch.tensor(theirs(logits, **settings)), -1).numpy()[0]
  n = 20_000
  keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), n)
  drawn = np.asarray(choose(np.repeat(logits, n, 0), keys, **settings))
  seen = np.bincount(drawn, minlength=40)
  assert not seen[probs == 0].any()
  sigma = np.sqrt(n * probs * (1 - probs))
  assert (np.abs(seen - n * probs) <= 6 * sigma + 1e-9).all()
