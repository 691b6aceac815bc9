"""A sweep from the flags of a command line."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dpo_jax.sweep.expand import FUNCTION, expand, flags_of, read_function
from dpo_jax.sweep.options import Sweep


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
