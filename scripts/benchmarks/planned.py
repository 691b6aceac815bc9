"""What the steps of the set for accelerators hold, told without accelerators.

  python scripts/benchmarks/planned.py --topology=h100:1
  python scripts/benchmarks/planned.py --topology=a100:1 --models=8b-lora \\
    --lengths=hh-like --remat=minimal

Compiles the step of each model of device_set.py for one device (see
dpo_jax/topology.py) and prints a markdown table: GB that the step is given,
weights of policy and reference, moments and a batch, and GB of temporaries
beside them, for each way to keep what the backward reads. Nothing is run.
docs/performance.md has the results.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks import device_set, jax_steps, lengths
from benchmarks.plan import plan
from benchmarks.problem import Problem
from dpo_jax import topology
from dpo_jax.errors import ConfigError
from dpo_jax.models.attention import choose


def compile_step(
  problem: Problem, remat: str, device: jax.Device
) -> jax.stages.Compiled:
  """The step of a problem's first batch, for a device that is not there."""
  attention = choose(problem.dtype, problem.head_size, device)
  _, step, tx = jax_steps.make_step(problem, attention, remat)
  state, reference, frozen = jax.eval_shape(
    lambda: jax_steps.start(problem, "", tx)
  )
  given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=SingleDeviceSharding(device)
    ),
    (state, reference, plan(problem)[0].batch, frozen),
  )
  return jax.jit(step, donate_argnums=0).lower(*given).compile()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", required=True, help="as of plan_memory.py")
  parser.add_argument("--models", default=device_set.DEFAULT_MODELS)
  parser.add_argument("--lengths", default="fixed")
  parser.add_argument("--remat", default="none,minimal,block")
  args = parser.parse_args()
  try:
    device = topology.devices(args.topology)[0]
  except ConfigError as e:
    sys.exit(str(e))
  ways = args.remat.split(",")
  print(f"{device.device_kind}, jax {jax.__version__}; GB\n")
  print(f"| model | lengths | tokens | given | {' | '.join(ways)} |")
  print("|---" * (4 + len(ways)) + "|")
  for model in args.models.split(","):
    for name in args.lengths.split(","):
      problem = _problem(model, name)
      tokens = plan(problem)[0].batch.tokens.size
      steps = [compile_step(problem, way, device) for way in ways]
      stats = [step.memory_analysis() for step in steps]
      given = stats[0].argument_size_in_bytes / 1e9
      between = " | ".join(f"{s.temp_size_in_bytes / 1e9:.1f}" for s in stats)
      print(f"| {model} | {name} | {tokens} | {given:.1f} | {between} |")


def _problem(model, name):
  fields = device_set.settings(model, name)
  sizes = Problem(**fields)
  found = lengths.draw(
    name, sizes.pairs * sizes.batches, longest=1024, seed=sizes.seed
  )
  return Problem(**fields, distribution=name, lengths=found)


if __name__ == "__main__":
  main()
