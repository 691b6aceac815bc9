"""Checkpoints in and out against transformers, with weights drawn anew."""

import numpy as np
import pytest

from dpo_jax.models import hf

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

pytestmark = pytest.mark.parity
__all__ = ["rng"]

CHECKPOINTS = {
  "plain": {},
  "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
  "llama3": {"rope_parameters": LLAMA3},
  "head_dim": {"head_dim": 16},
  "biases": {"attention_bias": True, "mlp_bias": True},
  "tied": {"tie_word_embeddings": True},
  "no_gqa_epsilon": {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one", "sharded"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_reads_checkpoints(rng, tmp_path, kind, sharded):
  theirs = hf_model(hf_config(rng, **CHECKPOINTS[kind]))
  theirs.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
  assert (tmp_path / "model.safetensors").exists() != sharded
  ids = rng.integers(0, theirs.config.vocab_size, (2, 150))
  np.testing.assert_allclose(
    our_logits(*load(tmp_path), ids), their_logits(theirs, ids),
    rtol=1e-4, atol=1e-4,
  )  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_writes_checkpoints(rng, tmp_path, kind):
  theirs = hf_model(hf_config(rng, **CHECKPOINTS[kind]))
  theirs.save_pretrained(tmp_path / "theirs")
  module, config = hf.read_config(tmp_path / "theirs")
  model, variables = load(tmp_path / "theirs")
  hf.save_checkpoint(
    tmp_path / "ours", module, config, variables, max_shard_bytes=20_000
  )
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", dtype=torch.float32, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  ids = rng.integers(0, theirs.config.vocab_size, (2, 150))
  np.testing.assert_array_equal(
    their_logits(again.eval(), ids), their_logits(theirs, ids)
  )
  np.testing.assert_allclose(
    our_logits(model, variables, ids), their_logits(again, ids),
    rtol=1e-4, atol=1e-4,
  )  # fmt: skip
