"""What of a model is trained: all of it, what no pattern freezes, or adapters.

The trained part is what the train state holds, with the optimizer's state for
it and nothing else; what is frozen lies beside it, once, and is the reference's
as well. Patterns are regular expressions, searched in names like `embed`,
`norm/scale` or `layers/3/attention/q/kernel`: layers are stacked in one array,
and counted in its names.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.errors import ConfigError

Tree = dict[str, Any]
_FIXED = re.compile(r"lora/.*/(scale|dropout)$")
VALUE = "value"  # collection of PPO's value model, beside the policy's
_ALWAYS = "params/score"  # a reward model's head, beside adapters too


class Trainable:
  """Takes variables apart into trained and frozen ones, and joins them."""

  def __init__(self, variables: Tree, freeze: str = "", rates: str = ""):
    """Decides what is trained, once.

    Args:
      variables: `params`, and `lora` where adapters are trained instead, of
        `params` then a reward model's head alone; arrays or shapes.
      freeze: pattern of what is not trained; "" freezes nothing.
      rates: pairs pattern=factor with blanks between, as in
        "embed=0.1 layers/[01]/=0.5": the learning rate of what matches is
        multiplied; the first match counts.

    Raises:
      ConfigError: not a pattern, one that matches nothing, a factor that is
        none, or everything frozen.
    """
    leaves = traverse.flatten_dict(variables, sep="/")
    names = {
      path: _names(path, leaf.shape)
      for path, leaf in leaves.items()
      if not _FIXED.search(path)
      and (path == _ALWAYS or path.startswith("lora/") == ("lora" in variables))
    }
    frozen = _search("optim.freeze", freeze, names) if freeze else {}
    self._trained = {
      path for path in names if not np.all(frozen.get(path, False))
    }
    if not self._trained:
      raise ConfigError(f"optim.freeze={freeze!r} leaves nothing to train")
    # Some layers of a stacked array: no gradient reaches them.
    self._held = {
      path: frozen[path]
      for path in self._trained
      if np.any(frozen.get(path, False))
    }
    self._layers = {
      path: ~self._held.get(path, np.zeros(len(names[path]), bool))
      for path in sorted(self._trained)
    }
    self._rates = _read_rates(rates, {p: names[p] for p in self._trained})

  def split(self, variables: Tree) -> tuple[Tree, Tree]:
    """(trained, frozen), both nested as they were; `join` is the inverse."""
    leaves = traverse.flatten_dict(variables, sep="/")
    parts = ({}, {})
    for path, leaf in leaves.items():
      parts[path not in self._trained][path] = leaf
    return tuple(traverse.unflatten_dict(x, sep="/") for x in parts)

  def join(self, frozen: Tree, trained: Tree) -> Tree:
    """The variables of the policy."""
    if not self._held:
      return join(frozen, trained)
    leaves = traverse.flatten_dict(trained, sep="/")
    for path, held in self._held.items():
      leaf = leaves[path]
      held = _along(path, held, leaf.ndim)
      leaves[path] = jnp.where(held, jax.lax.stop_gradient(leaf), leaf)
    return join(frozen, traverse.unflatten_dict(leaves, sep="/"))

  def layers(self) -> dict[str, np.ndarray]:
    """Which layers of each trained array are trained, bool[L]; bool[1] outside
    of the layers. By path, as in "params/layers/mlp/up/kernel"."""
    return dict(self._layers)

  def factors(self, trained: Tree) -> Tree | None:
    """Factor on the update of each trained array, f32[] or f32[L 1 ...]; None
    where all are 1."""
    if not self._held and not self._rates:
      return None
    leaves = traverse.flatten_dict(trained, sep="/")
    found = {}
    for path, leaf in leaves.items():
      factor = self._rates.get(path, np.ones(1, np.float32))
      moves = ~self._held.get(path, np.zeros(1, bool))
      found[path] = _along(path, factor * moves, len(leaf.shape))
    return traverse.unflatten_dict(found, sep="/")


def join(frozen: Tree, trained: Tree) -> Tree:
  """The variables of a policy of which nothing is held."""
  leaves = traverse.flatten_dict(frozen) | traverse.flatten_dict(trained)
  return traverse.unflatten_dict(leaves)


def count(tree: Tree) -> int:
  """Numbers in the arrays (or shapes) of a tree."""
  return sum(math.prod(x.shape) for x in traverse.flatten_dict(tree).values())


def _names(path: str, shape: tuple[int, ...]) -> list[str]:
  """Names that patterns see: of every layer, or of the one array."""
  _, _, name = path.partition("/")  # the collection
  head, _, rest = name.partition("/")
  if head != "layers":
    return [name]
  return [f"layers/{i}/{rest}" for i in range(shape[0])]


def _search(
  key: str, pattern: str, names: Mapping[str, list[str]]
) -> dict[str, np.ndarray]:
  """path -> which of its layers match."""
  try:
    compiled = re.compile(pattern)
  except re.error as e:
    raise ConfigError(f"{key}: {pattern!r} is not a pattern: {e}") from e
  found = {
    path: np.array([bool(compiled.search(name)) for name in of_path])
    for path, of_path in names.items()
  }
  found = {path: match for path, match in found.items() if match.any()}
  if not found:
    some = ", ".join(of_path[-1] for of_path in names.values())
    raise ConfigError(f"{key}: {pattern!r} matches none of {some}")
  return found


def _read_rates(
  text: str, names: Mapping[str, list[str]]
) -> dict[str, np.ndarray]:
  """path -> factor, f32[] or f32[L]."""
  key, rates = "optim.rates", {}
  for entry in reversed(text.split()):
    pattern, _, number = entry.rpartition("=")
    try:
      factor = float(number)
    except ValueError:
      factor = -1.0
    if not pattern or not 0 < factor < float("inf"):
      raise ConfigError(
        f"{key}: {entry!r} should be pattern=factor with a factor above 0"
        " (optim.freeze is for what is not trained)"
      )
    for path, match in _search(key, pattern, names).items():
      before = rates.get(path, np.ones(len(match), np.float32))
      rates[path] = np.where(match, np.float32(factor), before)
  return rates


def _along(path: str, of_layers: np.ndarray, ndim: int) -> np.ndarray:
  """[L] or [1] as [L 1 ...] or [], to go with an array of that path."""
  if "/layers/" not in path:
    return of_layers[0]
  return of_layers.reshape(-1, *[1] * (ndim - 1))
