"""A frozen base in 8 or 4 bits below adapters that are trained (QLoRA,
2305.14314), stored and unpacked by qwix.

The kernels of all layers are packed in tiles along their input, one float32
scale a tile and output; a layer is unpacked where it is used. Embeddings,
norms, biases and the router of experts stay as they are.
"""

import functools
import math
import re
from typing import Any

import flax.traverse_util as traverse
import jax

from dpo_jax.errors import ConfigError
from dpo_jax.models import layout

KINDS = ("int8", "int4", "nf4")
TILE = 64  # values that share a scale, as in QLoRA; fewer where it divides not
_KERNEL = re.compile(r"layers/.*(?<!router)/kernel$")


def library() -> Any:
  """qwix.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    import qwix
  except ImportError as e:
    raise ConfigError(
      "config.model.quantize needs qwix: pip install qwix, or dpo-jax[quantize]"
    ) from e
  return qwix


def pack(params: Any, kind: str) -> Any:
  """The same weights with kernels as `qwix.QArray`; leaf by leaf, so that one
  kernel at a time is there twice.

  Args:
    params: collection of a decoder, which the caller should hold no longer.
    kind: one of KINDS.

  Raises:
    ConfigError: another kind, or no qwix.
  """
  if kind not in KINDS:
    raise ConfigError(
      f"config.model.quantize={kind!r} should be one of {', '.join(KINDS)}"
    )
  leaves = traverse.flatten_dict(params, sep="/")
  del params  # or it would keep what is packed
  for path in list(leaves):
    if _KERNEL.fullmatch(path):
      leaves[path] = _pack_one(path, kind, leaves[path])
  return traverse.unflatten_dict(leaves, sep="/")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pack_one(path, kind, kernel):
  stacked = 2 if "/experts/" in path else 1
  tiled = stacked + layout.input_axes(path) - 1  # the last of the input
  return library().quantize(
    kernel.astype("float32"),
    kind,
    channelwise_axes=[i for i in range(kernel.ndim) if i != tiled],
    tiled_axes={tiled: math.gcd(kernel.shape[tiled], TILE)},
  )


def unpack(weights: Any) -> Any:
  """The weights (of one layer) as plain arrays; float32 where packed."""
  packed = library().QArray
  return jax.tree.map(
    lambda x: library().dequantize(x) if isinstance(x, packed) else x,
    weights,
    is_leaf=lambda x: isinstance(x, packed),
  )
