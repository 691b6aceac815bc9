"""Arrays that lie in their host's memory until a step uses them.

A sharding says by its memory kind where an array lies, and so does the type of
what is traced from it. Nothing is computed there: what is used is brought to
the device inside the program (`fetched`), and goes back by the shardings of
what the program gives.
"""

from collections.abc import Iterable
from typing import Any

import jax

from dpo_jax.errors import ConfigError

KIND = "pinned_host"


def check(setting: str, devices: Iterable[Any]) -> None:
  """Raises ConfigError where a device cannot reach such memory.

  Args:
    setting: that asks for it, for the message.
    devices: those of this process.
  """
  for device in devices:
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND not in kinds:
      raise ConfigError(
        f"{setting}: {device.device_kind} ({device.platform}) has no memory"
        f" of kind {KIND!r}; it has {', '.join(kinds) or 'none'}"
      )


def on_host(tree: Any) -> Any:
  """Shapes with shardings, to lie on the host. Single numbers stay on the
  device: they take no room, and a program reads them when it starts."""

  def one(x):
    place = x.sharding.with_memory_kind(KIND)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return jax.tree.map(lambda x: one(x) if x.shape else x, tree)


def lies_on_host(x: Any) -> bool:
  """Whether an array, or a shape with a sharding, does."""
  return x.sharding.memory_kind == KIND


def fetched(tree: Any) -> Any:
  """What of a tree lies on the host, on the device; the rest as it is. For
  arrays that are traced: where this is called is when they are moved."""

  def one(x):
    return jax.device_put(x, jax.memory.Space.Device) if is_there(x) else x

  return jax.tree.map(one, tree)


def is_there(x: jax.Array) -> bool:
  """Whether an array that is traced lies on the host."""
  return jax.typeof(x).memory_space == jax.memory.Space.Host
