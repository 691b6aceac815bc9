"""Low-rank adapters: y = x W + scale (x a) b, W as it was (LoRA, 2106.09685).

Adapters are a collection of their own beside `params`. For a projection with
the kernel `params/layers/attention/q/kernel` [L in... out...] it holds

  lora/layers/attention/q/a        f32[L in... R]  trained
  lora/layers/attention/q/b        f32[L R out...]  trained, 0 at first
  lora/layers/attention/q/scale    f32[L]  fixed: alpha / R
  lora/layers/attention/q/dropout  f32[L]  fixed: of x, where there is a key

The same model without this collection, or without the trained part of it, is
the model without adapters: the reference costs no second copy of the weights.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.errors import ConfigError
from dpo_jax.models import layout

Tree = dict[str, Any]
TRAINED = ("a", "b")
_KERNEL = re.compile(r"layers/(?:attention/([qkvo])|mlp/(gate|up|down))/kernel")


@dataclasses.dataclass(frozen=True)
class Lora:
  """What adapters a model has.

  Attributes:
    rank: R, at least 1.
    alpha: the adapter's product is multiplied by alpha / rank.
    targets: projections that have one, of q, k, v, o, gate, up and down;
      empty: all that the model has (experts have none).
    dropout: share of a projection's inputs that its adapter does not see while
      training.
    rslora: alpha / sqrt(rank) instead (2312.03732).
  """

  rank: int
  alpha: float = 16.0
  targets: tuple[str, ...] = ()
  dropout: float = 0.0
  rslora: bool = False

  def __post_init__(self):
    if self.rank < 1:
      raise ConfigError(f"lora.rank={self.rank} should be at least 1")
    if not 0 < self.alpha < math.inf:
      raise ConfigError(f"lora.alpha={self.alpha} should be above 0")
    if not 0 <= self.dropout < 1:
      raise ConfigError(f"lora.dropout={self.dropout} should be in [0, 1)")

  @property
  def scale(self) -> float:
    root = math.sqrt(self.rank) if self.rslora else self.rank
    return self.alpha / root


def targets(params: Tree, lora: Lora) -> dict[str, str]:
  """The projections with an adapter: path of the kernel without its last part
  -> short name, as in {"layers/attention/q": "q"}.

  Args:
    params: of the model, arrays or shapes.
    lora: which of them.

  Raises:
    ConfigError: one that the model does not have.
  """
  known = {}
  for path in traverse.flatten_dict(params, sep="/"):
    if match := _KERNEL.fullmatch(path):
      known[path.removesuffix("/kernel")] = match[1] or match[2]
  for name in lora.targets:
    if name not in known.values():
      raise ConfigError(
        f"lora.targets: {name!r} is no projection of this model; it has"
        f" {', '.join(known.values())}"
      )
  wanted = lora.targets or tuple(known.values())
  return {path: name for path, name in known.items() if name in wanted}


def init(rng: jax.Array, params: Tree, lora: Lora) -> Tree:
  """New adapters, the collection `lora`: `a` uniform in +-1/sqrt(inputs), as
  PEFT draws it, and `b` zero.

  Args:
    rng: key.
    params: of the model, arrays or shapes.
    lora: which adapters.
  """
  leaves = traverse.flatten_dict(params, sep="/")
  made = {}
  for path in targets(params, lora):
    rng, key = jax.random.split(rng)
    layers, *shape = leaves[f"{path}/kernel"].shape
    inputs = layout.input_axes(f"{path}/kernel")
    bound = 1 / math.sqrt(math.prod(shape[:inputs]))
    made[f"{path}/a"] = jax.random.uniform(
      key, (layers, *shape[:inputs], lora.rank), jnp.float32, -bound, bound
    )
    made[f"{path}/b"] = jnp.zeros((layers, lora.rank, *shape[inputs:]))
    made[f"{path}/scale"] = jnp.full(layers, lora.scale, jnp.float32)
    made[f"{path}/dropout"] = jnp.full(layers, lora.dropout, jnp.float32)
  return traverse.unflatten_dict(made, sep="/")


def merger(
  adapters: Tree,
) -> Callable[[str, tuple[int, ...], np.ndarray], np.ndarray]:
  """What turns weights into those with the adapters in them, part by part.

  Args:
    adapters: the collection `lora`, arrays that this process can read.

  Returns:
    A function of (path of a leaf in `params`, index of its stacked axes, that
    part of it) to the part W + scale a b, added in float32, in the dtype it
    had; other parts come back as they are.
  """
  leaves = traverse.flatten_dict(adapters, sep="/")

  def merged(path, index, part):
    where = path.removesuffix("/kernel")
    if where == path or f"{where}/a" not in leaves:
      return part
    a, b, scale = (
      np.asarray(leaves[f"{where}/{x}"][index]) for x in ("a", "b", "scale")
    )
    product = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
    whole = part.astype(np.float32) + scale * product.reshape(part.shape)
    return whole.astype(part.dtype)

  return merged
