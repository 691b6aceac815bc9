"""Devices that are not there: to compile for them, a description is enough."""

import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from dpo_jax.errors import ConfigError

_TAKEN = 0.75  # of a GPU's memory: XLA_PYTHON_CLIENT_MEM_FRACTION


class _Gpu(NamedTuple):
  """What the compiler asks about an NVIDIA GPU, as its data sheet has it."""

  name: str
  capability: int  # the major number
  cores: int
  lanes: int  # of a core, for float32
  shared: int  # KiB of a core
  largest: int  # KiB of them that a block may have
  memory: float  # GiB
  bandwidth: int  # GB/s
  cache: int  # MiB
  clock: float  # GHz

  @property
  def description(self) -> str:
    """As text of XLA's message GpuTargetConfigProto."""
    # What only GPUs of this number have, as Hopper's products.
    special = "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"
    return f"""gpu_device_info {{
      name: "{self.name}"
      cuda_compute_capability {{
        major: {self.capability} feature_extension: {special}
      }}
      core_count: {self.cores} fpus_per_core: {self.lanes}
      shared_memory_per_core: {self.shared * 2**10}
      shared_memory_per_block: {48 * 2**10}
      shared_memory_per_block_optin: {self.largest * 2**10}
      device_memory_size: {int(self.memory * 2**30)}
      memory_bandwidth: {self.bandwidth * 10**9}
      l2_cache_size: {self.cache * 2**20} clock_rate_ghz: {self.clock}
      threads_per_warp: 32 threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      driver_version: "12.9.0" runtime_version: "12.9.0"
      compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{self.name}"
    """


GPUS = {
  "a100": _Gpu(
    "NVIDIA A100 80GB", 8, 108, 64, 164, 163, 79.2, 2039, 40, 1.41
  ),
  "h100": _Gpu("NVIDIA H100 80GB", 9, 132, 128, 228, 227, 79.1, 3352, 50, 1.98),
  "h200": _Gpu("NVIDIA H200", 9, 132, 128, 228, 227, 141.0, 4800, 50, 1.98),
  "b200": _Gpu("NVIDIA B200", 10, 148, 128, 228, 227, 178.4, 7672, 126, 1.965),
}  # fmt: skip


def devices(name: str) -> list[Any]:
  """Devices to compile for and not to run on. To be called before anything else
  of jax.

  Args:
    name: kind and shape: of TPUs as libtpu has them, e.g. "v5e:2x4"; of GPUS
      the number, "h100:8", or the hosts and GPUs of each, "h100:2x8".

  Raises:
    ConfigError: the compiler for such devices is not installed, or knows none
      of that kind or shape.
  """
  kind, _, shape = name.partition(":")
  jax.config.update("jax_platforms", "cpu")
  if kind in GPUS:
    return _gpus(name, GPUS[kind], shape)
  return _tpus(name)


def limit(name: str) -> int | None:
  """Bytes that jax takes of such a device, unless told otherwise; None where
  that is not known here.

  Args:
    name: as of `devices`.
  """
  gpu = GPUS.get(name.partition(":")[0])
  return gpu and int(_TAKEN * gpu.memory * 2**30)


def _gpus(name, gpu, shape):
  hosts, _, each = shape.rpartition("x")
  if not each.isdigit() or (hosts and not hosts.isdigit()):
    raise ConfigError(
      f"--topology={name}: after the kind should come a number of GPUs, as in"
      " h100:8, or of hosts and of GPUs of each, as in h100:2x8"
    )
  # The check looks for a driver.
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  try:
    found = topologies.get_topology_desc(
      gpu.name, "cuda", topology=f"1x{hosts or 1}x{each}",
      target_config=gpu.description,
    )  # fmt: skip
  except NotImplementedError as e:
    raise ConfigError(
      f"--topology={name}: the compiler for GPUs is not installed; pip install"
      ' "jax[cuda13]"'
    ) from e
  except Exception as e:  # of the plugin's own kind
    raise ConfigError(f"--topology={name}: {_first_line(e)}") from e
  return list(found.devices)


def _tpus(name):
  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise ConfigError(
      f"--topology={name}: the compiler for TPUs is not installed; pip install"
      f' "jax[tpu]". GPUs are {", ".join(GPUS)}'
    ) from e
  # What libtpu would ask a cloud for and complains of where there is none; the
  # topology does not depend on it.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  try:
    return list(topologies.get_topology_desc(name, "tpu").devices)
  except Exception as e:  # of the plugin's own kind
    raise ConfigError(f"--topology={name}: {_first_line(e)}") from e


def _first_line(e):
  return str(e).strip().splitlines()[0]
