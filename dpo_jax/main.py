"""The command line: flags in, one line out for whatever is wrong."""

import logging
import re
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from dpo_jax.config import Config, from_dict
from dpo_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File of configs/, e.g. configs/dpo.py, or file:arguments."
)


def run(main: Callable[[Config], None]) -> None:
  """Parses flags into a typed config, calls `main`, and exits.

  Exit status: 0 done or stopped by a signal with its checkpoint saved; 2 bad
  input, with one line on stderr; anything else is a bug and shows a traceback.
  """
  logging.basicConfig(
    level=logging.INFO, format="%(message)s", stream=sys.stderr
  )
  for name in ("absl", "jax", "orbax"):
    logging.getLogger(name).setLevel(logging.WARNING)
  logging.getLogger("dpo_jax").setLevel(logging.INFO)

  def guarded(argv):
    if len(argv) > 1:
      raise UserError(
        f"unexpected argument {argv[1]!r}; settings are given as"
        " --config.section.field=value"
      )
    if _CONFIG.value is None:
      raise UserError("name a config, e.g. --config=configs/dpo.py")
    main(from_dict(_CONFIG.value.to_dict()))

  try:
    app.run(guarded, flags_parser=_parse)
  except UserError as e:
    _say(e)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except (KeyError, AttributeError, flags.Error, ValueError, TypeError) as e:
    raise UserError(_one_line(e)) from e
  except (OSError, ImportError, SyntaxError) as e:
    raise UserError(f"config: {_one_line(e)}") from e


def _one_line(error: BaseException) -> str:
  text = error.args[0] if isinstance(error, KeyError) else str(error)
  return re.sub(r"\s+", " ", str(text)).strip()


def _say(error: UserError) -> None:
  print(f"error: {_one_line(error)}", file=sys.stderr)
  sys.exit(2)
