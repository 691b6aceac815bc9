"""Devices that are not there: to compile for TPUs, their names are enough."""

import os
from typing import Any

import jax
from jax.experimental import topologies

from dpo_jax.errors import ConfigError


def devices(name: str) -> list[Any]:
  """Devices of a TPU topology, to compile for and not to run on. To be called
  before anything else of jax.

  Args:
    name: kind and shape, e.g. "v5e:2x4".

  Raises:
    ConfigError: libtpu is not installed, or knows no such topology.
  """
  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise ConfigError(
      f"--topology={name}: the compiler for TPUs is not installed; pip install"
      ' "jax[tpu]"'
    ) from e
  # What libtpu would ask a cloud for and complains of where there is none; the
  # topology does not depend on it.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  jax.config.update("jax_platforms", "cpu")
  try:
    return list(topologies.get_topology_desc(name, "tpu").devices)
  except Exception as e:  # of the plugin's own kind
    reason = str(e).strip().splitlines()[0]
    raise ConfigError(f"--topology={name}: {reason}") from e
