"""What every test gets: the checkout on the path, silent truncation an error.

Devices are left as they are: what needs eight of them starts a process of its
own (`test_train_step.py`), so that all other tests see what a user sees,
but for how hard the compiler tries.
"""

import gc
import os
import pathlib
import sys

import jax
import pytest

# A fraction of the time to compile, which is most of what tests do. XLA reads
# it when it first compiles, and processes that tests start inherit it.
_QUICKLY = "--xla_cpu_parallel_codegen_split_count=4"
if jax.__version_info__ < (0, 11):  # later ones end at a flag they do not know
  _QUICKLY += " --xla_cpu_use_fusion_emitters=false"
_UNOPTIMISED = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# Tracing makes many small objects that live on: looking through them so often
# takes a fifteenth of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

_ROOT = str(pathlib.Path(__file__).resolve().parents[1])
if _ROOT not in sys.path:  # `configs` and `dpo_jax`, installed or not
  sys.path.insert(0, _ROOT)


# The files that take longest, longest first: a process that came to one of them
# last would be waited for (scripts/test.sh keeps this order).
_FIRST = (
  "test_processes_of_one_run.py", "test_killed.py", "test_online.py",
  "test_train.py", "test_collectives.py", "test_compare_methods.py",
  "test_losses.py", "test_stopped.py", "test_dtypes.py", "test_train_step.py",
  "test_sweep_killed.py", "test_moe_models.py", "test_losses_golden.py",
  "test_layouts.py", "test_lora_runs.py", "test_disk.py",
  "test_mirrored_rows.py", "test_real_data.py", "test_families.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(_FIRST)}
  items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_configure(config):
  flags = [os.environ.get("XLA_FLAGS", ""), _QUICKLY]
  if config.option.markexpr != "parity":  # torch is met at the full level
    flags.append(_UNOPTIMISED)
  os.environ["XLA_FLAGS"] = " ".join(flags)
  # jax makes float32 of a float64 that was asked for, and only warns.
  config.addinivalue_line(
    "filterwarnings", "error:.*Explicitly requested dtype.*:UserWarning"
  )


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Thousands of compiled programs at a time are more memory maps than a
  process may have, and the compiler then ends it."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def compile_quickly():
  """For tests whose programs run once or twice: optimising these would take
  most of the time. Not where what is tested is what the optimiser makes."""
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)
