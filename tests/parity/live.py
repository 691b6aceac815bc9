"""What the parity tests share: the seed, checkpoints, logits of both sides."""

import os
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import hf

WHY = "parity tests need requirements-parity.txt"
SEED = int(os.environ.get("PARITY_SEED", secrets.randbits(32)))


@pytest.fixture
def rng():
  """A generator that is new at each run, and torch's seeded alike."""
  import torch

  print(f"PARITY_SEED={SEED}")
  torch.manual_seed(SEED)
  return np.random.default_rng(SEED)


def hf_config(rng, **changes):
  """A tiny `transformers.LlamaConfig`."""
  import transformers

  return transformers.LlamaConfig(
    **{
      "vocab_size": int(rng.integers(50, 90)),
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "max_position_embeddings": 512,
      "initializer_range": 0.2,
      "pad_token_id": 0,
      "bos_token_id": 1,
      "eos_token_id": 2,
    }
    | changes
  )


def hf_model(config):
  """Random weights, also where transformers begins with zeros and ones."""
  import torch
  import transformers

  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim == 1:
        p.normal_(1.0 if "norm" in name else 0.0, 0.2)
  return model


def load(path):
  """Our model and its variables, from a Hugging Face folder."""
  module, config = hf.read_config(path)
  model = module.Model(config)
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract
  )
  return model, hf.load_variables(path, module.HF_NAMES, abstract)


def our_logits(model, variables, ids):
  """i64[B T] -> f32[B T V]."""
  index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  hidden = model.apply(variables, ids, index, index * 0, index + 1)
  return hidden @ model.unembed(variables).T


def their_logits(model, ids):
  """i64[B T] -> f32[B T V]."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(ids)).logits.numpy()


LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0,
  "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}  # fmt: skip
