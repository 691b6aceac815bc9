"""What the parity tests share: the seed, checkpoints, logits of both sides,
trainers of TRL without a model, and how their numbers are compared.

PARITY_SEED repeats a run; it is printed with a failure.
"""

import collections
import os
import secrets
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.logps import capped
from dpo_jax.models import hf

WHY = "parity tests need requirements-parity.txt"
SEED = int(os.environ.get("PARITY_SEED", secrets.randbits(32)))
# One size a run: JAX then compiles each operation once, and not in every test.
PAIRS = SEED % 7 + 2
WIDTH = SEED % 36 + 4


@pytest.fixture
def rng():
  """A generator that is new at each run, and torch's seeded alike."""
  import torch

  print(f"PARITY_SEED={SEED}")
  torch.manual_seed(SEED)
  return np.random.default_rng(SEED)


def hf_config(rng, family="llama", **changes):
  """A tiny config of transformers, of any family."""
  import transformers

  return transformers.AutoConfig.for_model(
    family,
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
    | changes,
  )


def hf_model(config):
  """Random weights, also where transformers begins with zeros and ones."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_config(
    config, attn_implementation="eager"
  ).eval()
  one = 0.0 if "gemma" in config.model_type else 1.0  # it adds the 1
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim == 1:
        p.normal_(one if "norm" in name else 0.0, 0.2)
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
  return capped(hidden @ model.unembed(variables).T, model.logit_cap)


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

# Losses: TRL's code on log-probs or logits of our choice.

both_precisions = pytest.mark.parametrize(
  "x64", [True, False], ids=["float64", "float32"]
)
random_and_edge = pytest.mark.parametrize(
  "edge", [False, True], ids=["random", "edge"]
)


class Tokens(NamedTuple):
  """Log-probs of padded rows, chosen responses first, then rejected ones."""

  policy: np.ndarray  # f64[N T-1], 0 outside the response
  reference: np.ndarray  # f64[N T-1]
  squares: np.ndarray  # f64[N T-1], log sum_v p(v)^2
  mask: np.ndarray  # i64[N T], response tokens

  @property
  def lengths(self):
    return self.mask.sum(axis=1)


def draw_mask(rng, rows, edge):
  """i64[rows WIDTH], never at the first token; one-token responses at the
  `edge`."""
  starts = rng.integers(1, WIDTH, rows)
  if edge:
    starts[:: max(2, rows // 2)] = WIDTH - 1
  return (np.arange(WIDTH) >= starts[:, None]).astype(int)


def draw_tokens(rng, rows, edge):
  """Log-probs of about 1 a token and log-ratios to match. Or, at the `edge`:
  sums from 1e-5 to 1e4, log-ratios as large or zero, one-token responses.

  Log-probs are rounded to a grid of their row on which sums are exact also in
  float32 and in any order, so that the losses alone can differ.
  """
  mask = draw_mask(rng, rows, edge)
  shape = (rows, mask.shape[1] - 1)
  policy = -rng.exponential(1.0, shape)
  reference = policy * np.exp(rng.normal(0, 0.1, shape))
  if edge:
    scales = np.resize([1e-6, 1.0, 1.0, 300.0], (rows, 1))
    policy = policy * rng.permutation(scales)
    reference = -rng.exponential(1.0, shape) * rng.permutation(scales)
    reference[0] = policy[0]
  policy, reference = (_exact(x * mask[:, 1:]) for x in (policy, reference))
  squares = -rng.exponential(1.0, shape)
  return Tokens(policy, reference, squares, mask)


def _exact(x):
  largest = np.abs(x).sum(axis=1, keepdims=True)
  unit = 2.0 ** (np.ceil(np.log2(np.maximum(largest, 1e-30))) - 22)
  return np.round(x / unit) * unit


def trl_trainer(cls, **fields):
  """A trainer without its constructor: only what the loss code reads."""
  import torch

  trainer = cls.__new__(cls)
  same = lambda x: x
  trainer.accelerator = types.SimpleNamespace(
    device=torch.device("cpu"), gather=same, gather_for_metrics=same
  )
  # accelerate looks into it for an adapter, where peft is installed.
  trainer.model = types.SimpleNamespace(
    training=True, is_gradient_checkpointing=False, _modules={}
  )
  trainer.aux_loss_enabled = False
  trainer._metrics = {"train": collections.defaultdict(list)}
  trainer._total_train_tokens, trainer._tp_size = 0, 1
  for name, value in fields.items():
    setattr(trainer, name, value)
  return trainer


def trl_metrics(trainer):
  """What a trainer logged last."""
  logged = trainer._metrics["train"]
  return {name: values[-1] for name, values in logged.items()}


def trl_outputs(log_probs, log_sum_sq_probs=None):
  """What TRL's fused head returns, with log-probs of our choice."""
  import torch

  zeros = torch.zeros_like(log_probs.detach())
  return types.SimpleNamespace(
    log_probs=log_probs, log_sum_sq_probs=log_sum_sq_probs, entropy=zeros,
    mean_logits=zeros, is_top1=zeros.bool(),
  )  # fmt: skip


def tensor(x, x64, **options):
  """A torch tensor in the precision of the test."""
  import torch

  kind = torch.float64 if x64 else torch.float32
  return torch.tensor(np.asarray(x), dtype=kind, **options)


def array(x, x64):
  """A JAX array likewise."""
  return jnp.asarray(x, jnp.float64 if x64 else jnp.float32)


def tolerance(x64, edge, edge_float32=1e-3):
  """Relative. Rewards of 1e4 have an error of 1e-3 in float32, and their
  differences can be small: hence less at the edge."""
  if x64:
    return 1e-9
  return edge_float32 if edge else 1e-5


def check(ours, theirs, rtol, scale=None, where=None):
  """Ours is finite; it is theirs wherever that is finite, and `where`.

  Args:
    ours: array.
    theirs: array that broadcasts to ours.
    rtol: relative to each entry, and a tenth of it relative to `scale`.
    scale: size of what was added up; None is the largest entry of theirs.
    where: bool, broadcasts to ours from the left; None is everywhere.
  """
  ours = np.asarray(ours)
  theirs = np.broadcast_to(np.asarray(theirs), ours.shape)
  assert np.isfinite(ours).all()
  there = np.isfinite(theirs)
  if where is not None:
    there = there & where.reshape(where.shape + (1,) * (there.ndim - 1))
  ours, theirs = ours[there], theirs[there]
  if scale is None:
    scale = np.abs(theirs).max(initial=0)
  atol = 0.1 * rtol * max(float(scale), 0.1)
  np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def check_metrics(out, theirs, rtol, keys=()):
  """Means of rewards, log-probs and further `keys` as TRL logged them.

  By design a tie is half a success for us and a failure for TRL; where rewards
  are equal but for rounding, it is either.
  """
  with jax.enable_x64(out.loss.dtype == np.float64):
    sums = losses.reduce(out)
    means = {name: float(x.mean()) for name, x in sums.items()}
  sizes = {
    name: np.abs(x.value if isinstance(x, tuple) else x).max()
    for name, x in out.metrics.items()
  }
  wanted = [
    name
    for name in theirs
    if name.startswith(("rewards/", "logps/")) or name in keys
  ]
  for name in set(wanted) & out.metrics.keys() - {"rewards/accuracies"}:
    scale = sizes[name]
    if name == "rewards/margins":
      scale = sizes["rewards/chosen"] + sizes["rewards/rejected"]
    check(means[name], theirs[name], rtol, scale)
  if "rewards/accuracies" in out.metrics and "rewards/accuracies" in theirs:
    margins = np.abs(out.metrics["rewards/margins"])
    chosen = np.abs(out.metrics["rewards/chosen"])
    unclear = (margins <= rtol * chosen).mean()
    gap = means["rewards/accuracies"] - theirs["rewards/accuracies"]
    assert abs(gap) <= unclear + 1e-6
