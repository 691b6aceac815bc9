"""What each device of a mesh would hold, told without these devices."""

import math
import os

import jax

from dpo_jax import memory
from dpo_jax.config import Config
from dpo_jax.errors import ConfigError
from dpo_jax.run import Run

# Without it this compiler keeps far more temporaries alive than others.
_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def pretend(config: Config) -> int:
  """Makes this process see as many CPU devices as the config's mesh has; to be
  called before anything else of jax.

  Returns:
    How many.

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
  return n


def describe(config: Config) -> str:
  """Compiles the step of a run for the devices that `pretend` made."""
  if config.online.method:
    raise ConfigError(
      f"config.online.method={config.online.method!r}: what an online run holds"
      " is not planned; plan its update as that of a run on pairs"
    )
  run = Run(config)
  plan, mesh = run.train_plan, run.built.mesh
  rows, row = plan.shapes[-1]
  lines = [
    f"mesh        {dict(mesh.shape)}, {mesh.size} devices",
    f"batch       {plan.batch_size} examples in {rows} rows of"
    f" {row.tokens} tokens, {row.scored} of them scored",
    *memory.render(memory.held(run)),
    "temporary is what XLA plans for CPUs: read it as a size, not a promise",
  ]
  return "\n".join(lines)
