"""What each device holds in a step of a run, told without the devices.

  python scripts/plan_memory.py --config=configs/dpo.py \
    --config.model.path=MODEL --config.data.source=PAIRS.jsonl \
    --config.mesh.data=1 --config.mesh.fsdp=64

MODEL needs its config.json and tokenizer, and no weights.
"""

from dpo_jax import main


def _main(config):
  from dpo_jax import plan_memory

  plan_memory.pretend(config)
  print(plan_memory.describe(config))


if __name__ == "__main__":
  main.run(_main)
