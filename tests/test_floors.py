"""Imports point down the floors; the losses stand on jax alone."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1] / "dpo_jax"

# Lowest floor first. A module imports only from floors below its own, or from
# its own folder; errors are for everyone.
FLOORS = (
  ("errors", "batch", "files", "streams", "offload", "logps", "losses"),
  (
    "data",
    "models",
    "trainable",
    "one_sweep",
    "optim",
    "sharding",
    "checkpoint",
    "stored",
    "metrics",
    "writers",
    "progress",
    "report",
    "processes",
    "checksums",
    "lock",
    "config",
    "loss_checks",
    "calibration",
    "online_checks",
    "tabular",
    "collectives",
    "flops",
    "watch",
  ),
  ("score", "accumulate", "update", "decode", "config_file", "workdir"),
  ("sample", "sweep", "reward_score"),
  ("train_step",),
  ("evaluate", "build"),
  ("weights",),
  ("answers", "convert_sources", "reference_cache", "reward_model"),
  ("run", "judge", "convert", "asking"),
  ("online",),
  ("finish", "memory", "talking", "step_log"),
  ("dry_run", "plan_memory", "topology"),
  ("train", "check_data"),
  ("main", "compare", "best_of_n"),
)
_NEVER_EACH_OTHER = ("optim", "sharding", "checkpoint", "metrics")


def _part(module: str) -> str:
  return module.split(".")[1]


def _imports(path: pathlib.Path) -> set[str]:
  """Names of the parts of dpo_jax that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == "dpo_jax":
        found |= {alias.name for alias in node.names}
      elif node.module.startswith("dpo_jax."):
        found.add(_part(node.module))
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith("dpo_jax."):
          found.add(_part(alias.name))
  return found


def _parts() -> dict[str, set[str]]:
  """part -> parts it imports, itself left out."""
  parts: dict[str, set[str]] = {}
  for path in ROOT.rglob("*.py"):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part != "__init__":
      parts.setdefault(part, set()).update(_imports(path) - {part})
  return parts


def test_every_part_has_a_floor():
  known = [name for floor in FLOORS for name in floor]
  assert sorted(known) == sorted(_parts())


def test_imports_point_down():
  level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
  wrong = [
    f"{part} (floor {level[part]}) imports {other} (floor {level[other]})"
    for part, others in _parts().items()
    for other in others
    if level[other] >= level[part]
    and other not in ("errors", "batch")
    and not (level[other] == level[part] == 1)
  ]
  assert not wrong


def test_the_services_of_floor_one_do_not_know_each_other():
  parts = _parts()
  for name in _NEVER_EACH_OTHER:
    assert not parts[name] & set(_NEVER_EACH_OTHER)


def test_losses_import_jax_and_nothing_else():
  allowed = {
    "jax",
    "collections",
    "dataclasses",
    "difflib",
    "functools",
    "inspect",
    "itertools",
    "math",
    "numbers",
    "re",
    "typing",
    "dpo_jax",
  }
  for path in (ROOT / "losses").glob("*.py"):
    if path.name == "__main__.py":  # a command, imported by nobody
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module]
      else:
        continue
      for name in names:
        assert name.split(".")[0] in allowed, f"{path}: {name}"
        if name.startswith("dpo_jax"):
          assert name.startswith("dpo_jax.losses"), f"{path}: {name}"


def test_data_and_losses_never_import_the_training_stack():
  for folder in ("data", "losses"):
    for path in (ROOT / folder).glob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
          names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
          names = [node.module or ""]
        for name in names:
          assert name.split(".")[0] not in ("flax", "optax", "orbax"), path
