"""What a training step moves between eight devices, by mesh, against the least.

  python scripts/benchmarks/collectives.py [--weak]

Compiles the step of a small Llama (4 layers of width 128, vocabulary 4096) for
eight pretended CPU devices, 4 pairs a device, and prints a markdown table: MB
(10^6 bytes) that one device takes in by gathers and that it has added up over
devices, in a step. Nothing is run. With --weak: FLOPs and bytes of one device
on 1, 2, 4 and 8 of them. docs/scaling.md has the results.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TIED, UNTIED = ({"tie_word_embeddings": tied} for tied in (True, False))
CASES = (
  ("tied", (8, 1, 1), TIED, {}),
  ("tied", (1, 8, 1), TIED, {}),
  ("tied", (2, 4, 1), TIED, {}),
  ("untied", (1, 8, 1), UNTIED, {}),
  ("untied", (2, 4, 1), UNTIED, {}),
  ("untied, reference precomputed", (1, 8, 1), UNTIED,
   {"reference.precompute": True}),
  ("tied, LoRA of rank 4", (1, 8, 1), TIED, {"lora.rank": 4}),
  ("tied, 2 microbatches", (1, 8, 1), TIED, {"train.microbatches": 2}),
  ("untied", (1, 4, 2), UNTIED, {}),
  ("untied", (2, 2, 2), UNTIED, {}),
)  # fmt: skip
WEAK = ((1, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1))


def table(folder: pathlib.Path) -> None:
  from meshes import make_run

  from dpo_jax import collectives, memory

  print(
    "| model | data, fsdp, tensor | gathers | MB | least | sums | MB | least |"
    " permutes, all-to-alls |\n|---|---|---|---|---|---|---|---|---|"
  )
  for name, mesh, model, changes in CASES:
    run = make_run(folder, mesh, model, **changes)
    found = collectives.read(memory.compile_step(run).as_text())
    trained, _ = run.trainable.split(run.built.abstract)
    least = collectives.least(
      run.built.abstract["params"], trained, itemsize=4,
      reference=run.scores_reference(),
    )  # fmt: skip
    gathers = collectives.total(found, "all-gather")
    sums = collectives.total(found, *collectives.SUMS)
    others = collectives.total(found).count - gathers.count - sums.count
    print(
      f"| {name} | {mesh} | {gathers.count} | {gathers.received / 1e6:.3f}"
      f" | {least.gathered / 1e6:.3f} | {sums.count} | {sums.bytes / 1e6:.3f}"
      f" | {least.summed / 1e6:.3f} | {others} |",
      flush=True,
    )


def weak(folder: pathlib.Path, mesh: tuple[int, ...]) -> None:
  from meshes import make_run

  from dpo_jax import collectives, memory

  compiled = memory.compile_step(make_run(folder, mesh, TIED))
  cost = compiled.cost_analysis()
  moved = collectives.total(collectives.read(compiled.as_text())).received
  print(
    f"| {mesh[1]} | {cost['flops'] / 1e6:.0f}"
    f" | {cost['bytes accessed'] / 1e6:.1f} | {moved / 1e6:.2f}"
    f" | {compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f} |",
    flush=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--weak", action="store_true")
  parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.devices is None:  # a process of its own for each number of devices
    if args.weak:
      print(
        "| devices (fsdp) | MFLOP | MB accessed | MB taken in | temporary MB |"
        "\n|---|---|---|---|---|",
        flush=True,
      )
    for n in [mesh[1] for mesh in WEAK] if args.weak else [8]:
      flags = f"--xla_force_host_platform_device_count={n}"
      flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
      subprocess.run(
        [sys.executable, __file__, f"--devices={n}", *sys.argv[1:]],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
      )
    return
  with tempfile.TemporaryDirectory() as folder:
    if args.weak:
      weak(pathlib.Path(folder), (1, args.devices, 1))
    else:
      table(pathlib.Path(folder))


if __name__ == "__main__":
  main()
