"""Checkpoints in and out against transformers, with weights drawn anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import hf
from dpo_jax.sample import make_sampler

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

WINDOWED = {"use_sliding_window": True, "sliding_window": 23}
LINEAR = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0}
TYPES = [
  "full_attention", "sliding_attention", "sliding_attention", "full_attention"
]  # fmt: skip
EXPERTS = {"num_local_experts": 5, "initializer_range": 0.3}
QWEN3_MOE = EXPERTS | {"family": "qwen3_moe", "moe_intermediate_size": 24}
CHECKPOINTS = {
  "plain": {},
  "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
  "llama3": {"rope_parameters": LLAMA3},
  "head_dim": {"head_dim": 16},
  "biases": {"attention_bias": True, "mlp_bias": True},
  "tied": {"tie_word_embeddings": True},
  "no_gqa_epsilon": {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
  "mistral": {"family": "mistral", "sliding_window": 19},
  "mistral_global": {
    "family": "mistral", "sliding_window": None, "head_dim": 12,
    "rope_parameters": LINEAR,
  },
  "qwen2": {"family": "qwen2", "rms_norm_eps": 1e-3, "sliding_window": 9},
  "qwen2_windowed": {
    "family": "qwen2", "num_hidden_layers": 3, "max_window_layers": 1,
    "tie_word_embeddings": True, **WINDOWED,
  },
  "qwen3": {"family": "qwen3", "head_dim": 16, "attention_bias": True},
  "qwen3_windowed": {
    "family": "qwen3", "head_dim": 6, "num_hidden_layers": 4,
    "layer_types": TYPES, "rope_parameters": LLAMA3, **WINDOWED,
  },
  "mixtral": {"family": "mixtral", "rms_norm_eps": 1e-3, **EXPERTS},
  "mixtral_windowed": {
    "family": "mixtral", "sliding_window": 19, "head_dim": 12,
    "tie_word_embeddings": True, "rope_parameters": LINEAR,
    "num_experts_per_tok": 3, **EXPERTS,
  },
  "qwen3_moe": {
    "num_experts_per_tok": 3, "norm_topk_prob": False, "head_dim": 16,
    "attention_bias": True, **QWEN3_MOE,
  },
  "qwen3_moe_windowed": {
    "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 6,
    "num_hidden_layers": 3, "tie_word_embeddings": True,
    "rope_parameters": LLAMA3, **WINDOWED, **QWEN3_MOE,
  },
  "gemma2": {
    "family": "gemma2", "head_dim": 16, "sliding_window": 11,
    "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0, "num_hidden_layers": 3,
  },
  "gemma2_odd": {
    "family": "gemma2", "head_dim": 16, "num_hidden_layers": 4,
    "layer_types": TYPES, "sliding_window": 130, "attention_bias": True,
    "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "tie_word_embeddings": False, "rope_parameters": LINEAR,
  },
  "gemma3": {
    "family": "gemma3_text", "head_dim": 16, "sliding_window": 11,
    "query_pre_attn_scalar": 5, "num_hidden_layers": 5,
    "sliding_window_pattern": 3, "rope_scaling": {
      "rope_type": "linear", "factor": 8.0
    },
  },
  "gemma3_odd": {
    "family": "gemma3_text", "head_dim": 8, "sliding_window": 30,
    "num_hidden_layers": 4, "layer_types": TYPES, "rms_norm_eps": 1e-2,
    "final_logit_softcapping": 4.0, "attention_bias": True,
    "rope_parameters": {
      "full_attention": LINEAR,
      "sliding_attention": LINEAR | {"rope_theta": 50.0, "factor": 2.0},
    },
  },
}  # fmt: skip


def drawn(rng, kind):
  """A model of transformers with random weights."""
  return hf_model(hf_config(rng, **CHECKPOINTS[kind]))


@pytest.mark.parametrize("sharded", [False, True], ids=["one", "sharded"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_reads_checkpoints(rng, tmp_path, kind, sharded):
  theirs = drawn(rng, kind)
  theirs.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
  assert (tmp_path / "model.safetensors").exists() != sharded
  ids = rng.integers(0, theirs.config.vocab_size, (2, 150))
  np.testing.assert_allclose(
    our_logits(*load(tmp_path), ids), their_logits(theirs, ids),
    rtol=1e-4, atol=1e-4,
  )  # fmt: skip


BY_FAMILY = (
  "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2",
  "gemma3",
)  # fmt: skip


@pytest.mark.parametrize("kind", BY_FAMILY)
def test_bfloat16_is_as_near_to_float32_as_theirs(rng, tmp_path, kind):
  drawn(rng, kind).to(torch.bfloat16).save_pretrained(tmp_path)

  def read(dtype):  # anew: rotary frequencies stay float32 so
    return transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, dtype=dtype, attn_implementation="eager"
    ).eval()

  model, variables = load(tmp_path)
  ids = rng.integers(0, model.config.vocab_size, (2, 60))
  exact = our_logits(model, variables, ids)
  # The file in bfloat16, read into float32: nothing is lost.
  np.testing.assert_allclose(
    exact, their_logits(read(torch.float32), ids), rtol=1e-4, atol=1e-4
  )
  module, config = hf.read_config(tmp_path)
  low = module.Model(config, module.Compute(dtype=jnp.bfloat16))
  ours = np.asarray(our_logits(low, variables, ids), np.float32)
  with torch.no_grad():
    rounded = read(torch.bfloat16)(torch.tensor(ids)).logits.float()
  off = lambda x: np.sqrt(np.mean((np.asarray(x) - np.asarray(exact)) ** 2))
  assert 0 < off(ours) < 2 * off(rounded.numpy())


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_writes_checkpoints(rng, tmp_path, kind):
  theirs = drawn(rng, kind)
  theirs.save_pretrained(tmp_path / "theirs")
  module, config = hf.read_config(tmp_path / "theirs")
  model, variables = load(tmp_path / "theirs")
  hf.save_checkpoint(
    tmp_path / "ours", module, config, variables, max_shard_bytes=20_000
  )
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", dtype=torch.float32, output_loading_info=True,
    attn_implementation="eager",
  )  # fmt: skip
  assert not info["missing_keys"] and not info["unexpected_keys"]
  ids = rng.integers(0, theirs.config.vocab_size, (2, 150))
  np.testing.assert_array_equal(
    their_logits(again.eval(), ids), their_logits(theirs, ids)
  )
  np.testing.assert_allclose(
    our_logits(model, variables, ids), their_logits(again, ids),
    rtol=1e-4, atol=1e-4,
  )  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_greedy_tokens_are_those_of_generate(rng, tmp_path, kind):
  theirs = drawn(rng, kind)
  theirs.save_pretrained(tmp_path)
  model, variables = load(tmp_path)
  ids = rng.integers(3, theirs.config.vocab_size, (2, 29))
  # No token ends a response, of theirs or of ours.
  theirs.generation_config.eos_token_id = None
  out = theirs.generate(
    torch.tensor(ids), max_new_tokens=20, do_sample=False,
    return_dict_in_generate=True, output_scores=True,
  )  # fmt: skip
  sampler = make_sampler(model, max_tokens=20, stop_ids=(-1,), temperature=0)
  ours = sampler(variables, ids.tolist(), 0)
  for row in range(2):
    best = [s[row].topk(2).values.tolist() for s in out.scores]
    # From a near tie on, the two may go different ways.
    clear = [*(a - b > 1e-3 for a, b in best), False].index(False)
    np.testing.assert_array_equal(
      ours.tokens[row, :clear], out.sequences[row, 29 : 29 + clear]
    )
