"""The problem all variants solve: one model, one batch of pairs, one step.

Letters: B pairs, P prompt tokens, R response tokens, D width, F ffn, L layers,
H heads, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes and settings; every response has R tokens, so nothing is padded."""

  pairs: int = 4
  prompt: int = 512
  response: int = 128
  width: int = 256
  layers: int = 4
  heads: int = 8
  ffn: int = 704
  vocab: int = 32_000
  beta: float = 0.1
  learning_rate: float = 1e-5
  seed: int = 0

  @property
  def name(self) -> str:
    return (
      f"P={self.prompt} R={self.response} B={self.pairs} D={self.width}"
      f" H={self.heads} F={self.ffn} L={self.layers} V={self.vocab}"
    )

  @property
  def tokens(self) -> int:
    """Real tokens of a batch, a prompt counted once for its pair."""
    return self.pairs * (self.prompt + 2 * self.response)

  def draw(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids: prompts i32[B P], chosen i32[B R], rejected i32[B R]."""
    rng = np.random.default_rng(self.seed)
    sizes = (self.prompt, self.response, self.response)
    return tuple(
      rng.integers(1, self.vocab, (self.pairs, n), np.int32) for n in sizes
    )

  def model_config(self):
    from dpo_jax.models import llama

    return llama.Config(
      vocab_size=self.vocab,
      width=self.width,
      ffn=self.ffn,
      layers=self.layers,
      heads=self.heads,
      kv_heads=self.heads,
      head_dim=self.width // self.heads,
      max_length=self.prompt + self.response,
    )

  def save_weights(self, path: str) -> None:
    """Writes the random model as a Hugging Face folder, for all variants."""
    from dpo_jax.models import hf, llama

    config = self.model_config()
    init = jax.jit(llama.Model(config).init_variables)
    hf.save_checkpoint(path, llama, config, init(jax.random.key(self.seed)))


def gflop(problem: Problem, shared: bool) -> float:
  """Matrix-product GFLOP of one step: policy forward and backward (3 units) and
  reference forward (1).

  Args:
    problem: sizes.
    shared: what is needed at least, see `dpo_jax.flops`; False: two full
      sequences a pair, every position through the head, all T^2 keys.
  """
  p, r, d = problem.prompt, problem.response, problem.width
  if shared:
    from dpo_jax import flops

    config = problem.model_config()
    responses = np.full((problem.pairs, 2), r)
    work = flops.work(config, np.full(problem.pairs, p), responses)
    return 4 * flops.Costs(config, {}).forward(work) / 1e9
  layer = 4 * d * d + 3 * d * problem.ffn  # multiply-adds a token
  tokens = layer * problem.layers * 2 * (p + r)
  seen = 2 * (p + r) ** 2 * problem.layers
  head = 2 * (p + r)
  forward = 2 * tokens + 4 * d * seen + 2 * problem.vocab * d * head
  return 4 * forward * problem.pairs / 1e9


def state_and_reference(problem: Problem, path: str, tx):
  """TrainState and reference variables, read from the folder twice so that
  the step may donate one of them."""
  from dpo_jax.models import hf, llama
  from dpo_jax.train_step import TrainState

  model = llama.Model(problem.model_config())
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract
  )
  params, reference = (
    hf.load_variables(path, llama.HF_NAMES, abstract) for _ in range(2)
  )
  zero = jnp.int32(0)
  return TrainState(zero, params, tx.init(params), zero + 0), reference
