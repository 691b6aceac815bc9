"""What each device of a mesh would hold, told without these devices."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from dpo_jax import collectives, memory
from dpo_jax.build import build
from dpo_jax.config import Config
from dpo_jax.errors import ConfigError
from dpo_jax.run import Run

# Without it this compiler keeps far more temporaries alive than others.
_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def pretend(config: Config) -> list[Any]:
  """As many CPU devices as the config's mesh has, which this process sees from
  now on; to be called before anything else of jax.

  Raises:
    ConfigError: a size of the mesh is left open, or devices are known already.
  """
  sizes = vars(config.mesh)
  for axis, size in sizes.items():
    if size < 1:
      raise ConfigError(
        f"config.mesh.{axis}={size}: to plan, name a number; there are no"
        " devices to count"
      )
  n = math.prod(sizes.values())
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)
  except RuntimeError as e:
    raise ConfigError(f"{n} devices cannot be planned for: {e}") from e
  return jax.devices()


def describe(
  config: Config,
  devices: Sequence[Any] | None = None,
  limit: int | None = None,
) -> str:
  """Compiles the step of a run for devices that need not be there.

  Args:
    config: of the run.
    devices: those of `pretend` or `topology.devices`; all of jax if None.
    limit: bytes of a device that `model.remat=auto` is to fit into; None
      leaves it at the least.

  Returns:
    The mesh, the largest batch, what a device holds, and what a step moves
    between devices.
  """
  if config.online.method:
    raise ConfigError(
      f"config.online.method={config.online.method!r}: what an online run holds"
      " is not planned; plan its update as that of a run on pairs"
    )
  run = Run(config, build(config, devices))
  if limit is not None:
    memory.fit(run, limit)
  compiled = memory.compile_step(run)
  plan, mesh = run.train_plan, run.built.mesh
  rows, row = plan.shapes[-1]
  lines = [
    f"mesh        {dict(mesh.shape)}, {mesh.size} devices",
    f"batch       {plan.batch_size} examples in {rows} rows of"
    f" {row.tokens} tokens, {row.scored} of them scored",
    f"remat       {run.built.model.compute.remat}",
    *memory.render(memory.held(run, compiled)),
    *_moved(compiled),
  ]
  if mesh.devices.flat[0].platform == "cpu":
    lines.append(
      "temporary is what XLA plans for CPUs: read it as a size, not a promise"
    )
  return "\n".join(lines)


def _moved(compiled: Any) -> list[str]:
  """What a step moves between devices, one line a kind."""
  found = collectives.read(compiled.as_text())
  lines = []
  for kind in collectives.KINDS:
    count, whole, received = collectives.total(found, kind)
    if count:
      lines.append(
        f"  {kind:18s}{count:6d} times{whole / 2**20:10.1f} MiB in all,"
        f" {received / 2**20:.1f} MiB come to a device"
      )
  if not all(one.known for one in found):
    lines.append("  some in loops of unknown length, counted once")
  return ["moved       in a step", *lines] if lines else []
