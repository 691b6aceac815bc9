"""What each device holds in a step of a run, told without the devices.

  python scripts/plan_memory.py --config=configs/dpo.py \
    --config.model.path=MODEL --config.data.source=PAIRS.jsonl \
    --config.mesh.data=1 --config.mesh.fsdp=64

MODEL needs its config.json and tokenizer, and no weights. The step is compiled
for as many CPUs as the mesh has devices, or, with `pip install "jax[tpu]"` or
`"jax[cuda13]"`, for TPUs or GPUs that need not be there:

  ... --config.mesh.fsdp=8 --topology=v5e:2x4
  ... --config.mesh.fsdp=8 --topology=h100:8
"""

from absl import flags

from dpo_jax import main

_TOPOLOGY = flags.DEFINE_string(
  "topology",
  "",
  "TPUs or GPUs to compile for: kind and shape, e.g. v5e:2x4 or h100:8",
)


def _main(config):
  from dpo_jax import plan_memory, topology

  name = _TOPOLOGY.value
  devices = topology.devices(name) if name else plan_memory.pretend(config)
  limit = topology.limit(name)
  print(plan_memory.describe(config, devices, limit))


if __name__ == "__main__":
  main.run(_main)
