"""FLOPs that a training step needs at least, and what devices could do.

Needed are the products with weights and in attention over tokens that are
there: a prompt once for all its responses, no padding, visible keys only, the
head where a response token is predicted (a reward model's at a response's last
token) and the last layer only there, but for its keys and values, nothing
twice. What recomputing (remat, tiles of the head, blocks of attention) costs on
top is not counted, so that `mfu` is a share of useful work. A multiply-add is
two FLOPs; norms, softmax, optimizer and the loss itself are left out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpo_jax.models.shape import Config


class Work(NamedTuple):
  """What some examples make a model do, in numbers of things."""

  tokens: int  # through the layers
  seen: int  # (query, visible key) pairs in a layer that sees all
  seen_near: int  # likewise in a layer with a sliding window
  scored: int  # positions that meet the head
  asked: int  # (query, visible key) pairs of these in the last layer


def work(config: Config, prompts: np.ndarray, responses: np.ndarray) -> Work:
  """Counts the work of examples laid out as in `dpo_jax.batch`.

  Args:
    config: of the model.
    prompts: i[N], tokens of each prompt, at least 1.
    responses: i[N K], tokens of each response, 0 for none.
  """
  prompts = np.asarray(prompts, np.int64)
  responses = np.asarray(responses, np.int64)
  before = prompts - 1  # its last token is the first of each response's

  def seen(window):
    """Of the prompts, and of the responses."""
    shared = _causal(before, window)
    own = _causal(before[:, None] + responses, window) - shared[:, None]
    return int(shared.sum()), int(own.sum())

  scored, everywhere = int(responses.sum()), seen(None)
  near = seen(config.window) if any(config.local) else (0, 0)
  found = Work(
    int(before.sum()) + scored,
    sum(everywhere),
    sum(near),
    scored,
    (near if config.local[-1] else everywhere)[1],
  )
  if not config.scalar_head:
    return found
  # Of each response only the last position is scored.
  there = responses > 0
  keys = np.where(there, before[:, None] + responses, 0)
  if config.local[-1]:
    keys = np.minimum(keys, config.window)
  return found._replace(scored=int(there.sum()), asked=int(keys.sum()))


class Costs:
  """FLOPs of a model's forward and of its backward, by work."""

  def __init__(
    self,
    config: Config,
    trained: Mapping[str, np.ndarray],
    adapters: Mapping[str, int] | None = None,
  ):
    """Works out the costs of a unit of each kind of work.

    A weight that is not trained needs no gradient of its own, and what lies
    below all that is trained needs no backward. The lowest layer of which
    something is trained counts whole.

    Args:
      config: of the model.
      trained: which layers of each trained array, bool[L] (bool[1] outside of
        layers), by path, as in "params/layers/attention/q/kernel".
      adapters: numbers a layer of each trained adapter array, by path.
    """
    c, local = config, np.array(config.local)
    kernels = _kernels(c)
    nothing = np.zeros(c.layers, bool)
    # [kernels, layers], multiply-adds a token: through the base, of adapters,
    # and of the trained base's own gradients.
    base = np.array([[size] * c.layers for size in kernels.values()], float)
    extra = np.array(
      [
        [sum(n for path, n in (adapters or {}).items() if _of(name, path))]
        * c.layers
        for name in kernels
      ],
      float,
    )
    own = base * [
      np.broadcast_to(trained.get(f"params/layers/{name}", nothing), c.layers)
      for name in kernels
    ]
    moves = np.array(nothing)
    for path, layers in trained.items():
      if "/layers/" in path:
        moves |= layers
    below = np.logical_or.accumulate(moves | ("params/embed" in trained))
    # Which of a layer's work the last one does for scored tokens only.
    earlier, last = np.arange(c.layers) < c.layers - 1, np.zeros(c.layers, bool)
    last[-1] = True
    cached = np.array([name.split("/")[1] in ("k", "v") for name in kernels])
    all_tokens = earlier | cached[:, None]

    def by_work(of_kernels, layers, head):
      """FLOPs of a unit of each kind of work."""
      products = 4 * c.heads * c.head_dim
      return np.array([
        2 * of_kernels[all_tokens].sum(),
        products * (layers & earlier & ~local).sum(),
        products * (layers & earlier & local).sum(),
        2 * of_kernels[~all_tokens].sum() + head,
        products * (layers & last).sum(),
      ])  # fmt: skip

    head, unembed = 2 * c.vocab_size * c.width, "params/unembed"
    if c.scalar_head:
      head, unembed = 2 * c.width, "params/score"
    elif c.tied:
      unembed = "params/embed"
    reached = below.any() or "params/norm/scale" in trained
    everywhere = np.ones(c.layers, bool)
    self._forward = by_work(base, everywhere, head)
    self._adapters = by_work(extra, np.array(nothing), 0)
    times = int(reached) + (unembed in trained)
    self._backward = by_work(below * base + own, nothing, head * times)
    self._backward += 2 * self._adapters + 2 * by_work(0 * base, below, 0)

  def forward(self, work: Work, adapters: bool = False) -> float:
    """FLOPs of scoring; `adapters` are the policy's, on top of the base."""
    costs = self._forward + (self._adapters if adapters else 0)
    return float(costs @ np.array(work, np.float64))

  def backward(self, work: Work) -> float:
    """FLOPs of the gradient of what is trained."""
    return float(self._backward @ np.array(work, np.float64))


def _kernels(c: Config) -> dict[str, int]:
  """Multiply-adds a token with each kernel of a layer."""
  q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
  attention = {"q": q, "k": kv, "v": kv, "o": q}
  found = {f"attention/{k}/kernel": c.width * n for k, n in attention.items()}
  mlp, times = "mlp", 1
  if c.experts is not None:
    mlp, times = "mlp/experts", c.experts_per_token
    found["mlp/router/kernel"] = c.width * c.experts
  for name in ("gate", "up", "down"):
    found[f"{mlp}/{name}/kernel"] = times * c.width * c.ffn
  return found


def _of(kernel: str, path: str) -> bool:
  """Whether an adapter's array belongs to a kernel of `_kernels`."""
  return f"/{kernel.rpartition('/')[0]}/" in path


def _causal(n: np.ndarray, window: int | None) -> np.ndarray:
  """(query, key) pairs of the first n positions: each sees itself and those
  before, at most `window`."""
  if window is None:
    return n * (n + 1) // 2
  full = np.minimum(n, window)
  return full * (full + 1) // 2 + (n - full) * window


class Peak(NamedTuple):
  """Dense matrix products, in TFLOP/s of a JAX device."""

  bfloat16: float
  float32: float  # at JAX's default precision: bfloat16 on TPU, TF32 on GPU


# By the beginning of `device_kind`, the longest that fits. TPUs: peak compute
# per chip of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; a TPU7x
# chip is two devices to JAX. GPUs: NVIDIA's data sheets of the product, halved
# where they count sparsity; of Blackwell what those of HGX B200 and GB200 NVL72
# say of one GPU.
_PEAKS = {
  "TPU v4": Peak(275, 275),
  "TPU v5 lite": Peak(197, 197),
  "TPU v5e": Peak(197, 197),
  "TPU v5": Peak(459, 459),
  "TPU v5p": Peak(459, 459),
  "TPU v6 lite": Peak(918, 918),
  "TPU v6e": Peak(918, 918),
  "TPU7x": Peak(1153.5, 1153.5),
  "NVIDIA A100": Peak(312, 156),
  "NVIDIA L4": Peak(121, 60),
  "NVIDIA L40S": Peak(362, 183),
  "NVIDIA H100": Peak(989, 494),
  "NVIDIA H100 PCIe": Peak(756, 378),
  "NVIDIA H100 NVL": Peak(835, 417),
  "NVIDIA GH200": Peak(989, 494),
  "NVIDIA H200": Peak(989, 494),
  "NVIDIA H200 NVL": Peak(835, 417),
  "NVIDIA B200": Peak(2250, 1100),
  "NVIDIA GB200": Peak(2500, 1250),
}


def peak(kind: str, dtype: str, known: float = 0.0) -> float | None:
  """FLOP/s that one device could reach; None if that is not known.

  Args:
    kind: `device_kind` of a JAX device.
    dtype: of activations, "bfloat16" or "float32".
    known: TFLOP/s to take instead, where above 0.
  """
  if known > 0:
    return known * 1e12
  fits = [name for name in _PEAKS if _is(name, kind)]
  if not fits:
    return None
  return getattr(_PEAKS[max(fits, key=len)], dtype) * 1e12


def _is(name: str, kind: str) -> bool:
  """Whether a kind is of that name: NVIDIA L40 is no L4."""
  after = kind[len(name) : len(name) + 1]
  return kind.startswith(name) and not after.isalnum()
