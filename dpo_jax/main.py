"""The command line: flags in, one line out for whatever is wrong."""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from dpo_jax import processes
from dpo_jax.config import Config, from_dict
from dpo_jax.errors import UserError
from dpo_jax.streams import Unread, watched

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File of configs/, e.g. configs/dpo.py, or file:arguments."
)


_COORDINATOR = flags.DEFINE_string(
  "coordinator", None,
  "host:port of the first of many processes; not needed on SLURM, GKE and Cloud"
  " TPU. Or DPO_JAX_COORDINATOR in the environment; so for the next two.",
)  # fmt: skip
_PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which this one is, from 0.")
_HEARTBEAT = flags.DEFINE_integer(
  "heartbeat_seconds", 100, "After so long without a sign the rest end, too."
)


def run(
  main: Callable[[Config], None], *, many: bool = False, goes_on: bool = False
) -> None:
  """Parses flags into a typed config, calls `main`, and exits.

  Exit status: 0 done; 75 (`processes.STOPPED`) stopped by a signal, the same
  command continues; 2 bad input, with one line on stderr; anything else is a
  bug and shows a traceback.

  Args:
    main: the program.
    many: whether it may be one of many processes.
    goes_on: see `guard`.
  """

  def guarded(argv):
    if len(argv) > 1:
      raise UserError(
        f"unexpected argument {argv[1]!r}; settings are given as"
        " --config.section.field=value"
      )
    config = _read_config()
    if many:
      processes.start(
        _given(_COORDINATOR, str) or "",
        _given(_PROCESSES, int) or 0,
        _given(_PROCESS, int),
        heartbeat_seconds=_HEARTBEAT.value,
      )
      if not processes.leads():
        logging.getLogger("dpo_jax").setLevel(logging.WARNING)
    main(config)
    sys.stdout.flush()  # or Python would at its end, past what follows

  with guard(goes_on=goes_on):
    # As `python -m` has it: config files and reward functions may lie there.
    sys.path.append(os.getcwd())
    app.run(guarded, flags_parser=_parse)


@contextlib.contextmanager
def guard(*, goes_on: bool = False) -> Iterator[None]:
  """Sets up logging; a `UserError` becomes one line on stderr and status 2,
  `Stopped` one line and status 75.

  Args:
    goes_on: whether there is more to do than to print, which is done also once
      nobody reads standard output any more. A report ends there, with 0.
  """
  with watched(goes_on=goes_on), _guard():
    yield


@contextlib.contextmanager
def _guard() -> Iterator[None]:
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(message)s"))
  log = logging.getLogger("dpo_jax")
  log.handlers = [handler]
  log.setLevel(logging.INFO)
  log.propagate = False
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.set_stderrthreshold("warning")
  try:
    yield
    sys.stdout.flush()
  except UserError as e:
    print(f"error: {_one_line(e)}", file=sys.stderr)
    processes.end(2)
  except processes.Stopped as e:
    print(e)
    processes.end(processes.STOPPED)
  except Unread:
    sys.exit(0)
  except Exception:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    processes.end(1)


def _given(flag, kind):
  """The value of a flag, or of the environment, or None."""
  name = f"DPO_JAX_{flag.name.upper()}"
  if flag.value is not None or not os.environ.get(name):
    return flag.value
  try:
    return kind(os.environ[name])
  except ValueError as e:
    raise UserError(f"{name}={os.environ[name]!r} should be a number") from e


def _read_config() -> Config:
  if _CONFIG.value is None:
    raise UserError("name a config, e.g. --config=configs/dpo.py")
  try:
    values = _CONFIG.value.to_dict()
  except OSError as e:
    if "No such file" not in str(e):
      raise UserError(f"--config: {_one_line(e)}") from e
    path = str(e).strip().splitlines()[-1].rpartition(": ")[2]
    raise UserError(f"--config={path.strip(chr(39))}: no such file") from e
  except AttributeError as e:
    raise UserError(
      "--config: get_config of the file should return a ConfigDict, not"
      f" {_CONFIG.value!r}"
    ) from e
  return from_dict(values)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except SyntaxError as e:
    raise UserError(f"{e.filename}:{e.lineno}: {e.msg}") from e
  except (KeyError, AttributeError) as e:
    raise UserError(_unknown_key(e, argv)) from e
  except (flags.Error, ValueError, TypeError, OSError, RecursionError) as e:
    raise UserError(_one_line(e)) from e


def _unknown_key(error: Exception, argv) -> str:
  """ml_collections says which key, and maybe what was meant, but not where."""
  if "get_config" in str(error):
    return "--config: the file has no function get_config"
  words = re.findall(r"[A-Za-z_]\w*", str(error).replace("\\n", " "))
  key, *hint = words or [""]
  flag = next((a for a in argv if re.search(rf"[.]{key}(=|$)", a)), None)
  if not flag:
    return f"--config: {_one_line(error)}"
  meant = f"; did you mean {hint[3]!r}?" if hint[:3] == _MEANT else ""
  return f"{flag}: the config has no {key!r}{meant}"


_MEANT = ["Did", "you", "mean"]


def _one_line(error: BaseException) -> str:
  text = error.args[0] if isinstance(error, KeyError) else str(error)
  text = str(text)
  if "Traceback (most recent call last)" in text:
    # ml_collections passes on whole tracebacks; their last line is the error.
    text = text.strip().splitlines()[-1].partition("Error: ")[2]
  return re.sub(r"\s+", " ", text).strip()
