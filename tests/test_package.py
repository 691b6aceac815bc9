"""What `pip install` of the package asks of another project."""

import pathlib
import subprocess
import sys
import textwrap
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def fresh(script):
  """Runs a script in a process of its own; returns its standard output."""
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_package_needs_jax_and_nothing_else():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert project["dependencies"] == ["jax>=0.10"]
  assert "dependencies" not in project.get("dynamic", [])


def test_importing_the_losses_takes_less_than_a_fifth_of_a_second():
  """Beyond the import of jax; the best of three, as machines have bad days."""
  script = """
    import time
    import jax
    import jax.numpy
    start = time.perf_counter()
    from dpo_jax import losses
    print(time.perf_counter() - start)
  """
  assert min(float(fresh(script)) for _ in range(3)) < 0.2


def test_importing_the_losses_starts_no_backend():
  """A program may still choose its platform, or call
  `jax.distributed.initialize`, after the import."""
  script = """
    from dpo_jax import losses
    try:
      from jax._src.xla_bridge import _backends
    except ImportError:  # private to jax; the next test needs no such thing
      _backends = {}
    print(len(_backends))
  """
  assert fresh(script).split() == ["0"]


def test_the_platform_may_be_chosen_after_the_import():
  script = """
    import jax
    from dpo_jax import losses
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 3)  # refused by a live backend
    print(jax.device_count())
  """
  assert fresh(script).split() == ["3"]
