"""A sweep from the flags of a command line."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dpo_jax.sweep.expand import FUNCTION, expand, flags_of, read_function
from dpo_jax.sweep.launch import Task, host_name
from dpo_jax.sweep.options import Sweep
from dpo_jax.sweep.status import Place


def read_sweep(
  flag: Any,
  workdir: str | os.PathLike,
  train: Sequence[str],
  function: str = FUNCTION,
) -> Sweep:
  """What `--config`, its overrides and the file's sweep function say.

  Args:
    flag: the parsed flag of the config file; overrides given beside it hold for
      every run, those of the sweep come after them.
    workdir: the directory of the sweep.
    train: how a run's command begins: a Python and scripts/train.py.
    function: name of the file's function.

  Raises:
    ConfigError: in one line, everything that is wrong with any run.
  """
  runs = expand(flag.value, read_function(flag.config_filename, function))
  given = flags_of(flag.override_values)
  command = [*train, f"--config={flag.config_filename}", *given]
  root = pathlib.Path(workdir).expanduser().absolute()
  return Sweep(root, command, runs)


def read_tasks(
  flag: Any, workdir: str | os.PathLike, python: str, function: str
) -> tuple[pathlib.Path, str, list[Task]]:
  """The runs to send to a cluster: those whose directories are not complete.

  Args:
    flag: the parsed flag of the config file.
    workdir: of the one run, or of the sweep.
    python: the cluster's.
    function: of the config file, for a sweep; "" for one run.

  Returns:
    The directory, a name for all, and the runs.

  Raises:
    ConfigError: in one line, everything that is wrong with any run.
  """
  train = [python, "scripts/train.py"]
  root = pathlib.Path(workdir).expanduser().absolute()
  name = host_name(root.name)
  if not function:
    given = flags_of(flag.override_values)
    config = f"--config={flag.config_filename}"
    command = [*train, config, *given, f"--workdir={root}"]
    done = Place(root).complete()
    return root, name, [] if done else [Task(root.name, name, command)]
  sweep = read_sweep(flag, root, train, function)
  tasks = [
    Task(run.id, f"{name}-{run.id.rpartition('-')[2]}", sweep.command(run))
    for run in sweep.runs
    if not sweep.place(run).complete()
  ]
  return root, name, tasks
