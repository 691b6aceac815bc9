"""The problem all variants solve: one model, some batches of pairs, one step.

Letters: B pairs, P prompt tokens, R response tokens, D width, F ffn, L layers,
H heads, V vocabulary.
"""

import dataclasses
from typing import Any

import numpy as np

ROPE_THETA = 1_000_000.0  # Tunix's, which it does not read from a config
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes and settings. Without `lengths` every prompt has P tokens and every
  response R, so nothing is padded."""

  pairs: int = 4  # a batch
  batches: int = 1  # that steps take in turn
  prompt: int = 512
  response: int = 128
  width: int = 256
  layers: int = 4
  heads: int = 8
  kv_heads: int = 0  # 0: as many as heads
  ffn: int = 704
  vocab: int = 32_000
  tied: bool = False
  dtype: str = "float32"  # of weights and activations
  lora: int = 0  # rank of adapters on all projections; 0 trains everything
  head_tile: int = 1024  # scored tokens whose logits are alive at once, of ours
  beta: float = 0.1
  learning_rate: float = 1e-5
  seed: int = 0
  distribution: str = "fixed"  # what the lengths were drawn from
  # Tokens of prompt, chosen and rejected response, of all pairs in order.
  lengths: tuple[tuple[int, int, int], ...] = ()

  def __post_init__(self):
    fixed = ((self.prompt, self.response, self.response),)
    lengths = self.lengths or fixed * (self.pairs * self.batches)
    lengths = tuple(tuple(int(n) for n in of_pair) for of_pair in lengths)
    if len(lengths) != self.pairs * self.batches:
      raise ValueError(
        f"lengths of {len(lengths)} pairs, for {self.batches} batches of"
        f" {self.pairs}"
      )
    object.__setattr__(self, "lengths", lengths)

  @property
  def name(self) -> str:
    sizes = f"P={self.prompt} R={self.response}"
    if self.distribution != "fixed":
      prompts, *responses = np.array(self.lengths).T
      sizes = (
        f"{self.distribution} lengths (prompts {prompts.mean():.0f} on average,"
        f" responses {np.mean(responses):.0f}, longest {self.longest})"
      )
    batches = f" in {self.batches} batches" if self.batches > 1 else ""
    return (
      f"{sizes} B={self.pairs}{batches} D={self.width} H={self.heads}"
      f"{f'/{self.kv_heads}' if self.kv_heads else ''} F={self.ffn}"
      f" L={self.layers} V={self.vocab}{' tied' if self.tied else ''}"
      f"{f' LoRA {self.lora}' if self.lora else ''} {self.dtype}"
    )

  @property
  def head_size(self) -> int:
    return self.width // self.heads

  @property
  def tokens(self) -> float:
    """Real tokens of a batch on average, a prompt counted once for its pair."""
    return float(np.sum(self.lengths)) / self.batches

  @property
  def longest(self) -> int:
    """Tokens of the longest prompt with a response."""
    return max(p + max(responses) for p, *responses in self.lengths)

  def draw(self) -> list[list[Pair]]:
    """Token ids i32[...] of every batch; 0, which may pad, is not among them.
    The same in every process."""
    rng = np.random.default_rng(self.seed)
    pairs = [
      tuple(rng.integers(1, self.vocab, n, np.int32) for n in of_pair)
      for of_pair in self.lengths
    ]
    n = self.pairs
    return [pairs[i : i + n] for i in range(0, len(pairs), n)]

  def padded(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every batch the common way: chosen sequences, then rejected ones, padded
    on the right to the longest of the batch.

    Returns:
      Of each: tokens i32[2B T], tokens of the prompts i32[2B], and of prompt
      and response together i32[2B].
    """
    found = []
    for batch in self.draw():
      rows = [np.concatenate([p, x]) for p, x, _ in batch]
      rows += [np.concatenate([p, y]) for p, _, y in batch]
      ends = np.array([len(row) for row in rows], np.int32)
      tokens = np.zeros((len(rows), ends.max()), np.int32)
      for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = row
      prompts = np.array([len(p) for p, *_ in batch] * 2, np.int32)
      found.append((tokens, prompts, ends))
    return found

  def model_config(self) -> Any:
    from dpo_jax.models import llama

    return llama.Config(
      vocab_size=self.vocab,
      width=self.width,
      ffn=self.ffn,
      layers=self.layers,
      heads=self.heads,
      kv_heads=self.kv_heads or self.heads,
      head_dim=self.head_size,
      max_length=self.longest,
      rope_theta=ROPE_THETA,
      tied=self.tied,
    )

  def model(self, **compute: Any) -> Any:
    """The decoder, in this problem's dtype; `compute` as of `llama.Compute`."""
    from dpo_jax.models import llama

    dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
    return llama.Model(self.model_config(), llama.Compute(**dtypes, **compute))

  def save_weights(self, path: str) -> None:
    """Writes the random model as a Hugging Face folder, for all variants."""
    import jax

    from dpo_jax.models import hf, llama

    init = jax.jit(self.model().init_variables)
    variables = init(jax.random.key(self.seed))
    hf.save_checkpoint(path, llama, self.model_config(), variables)
