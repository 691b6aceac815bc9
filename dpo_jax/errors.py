"""Errors that a person at a terminal can act on.

Each message is one line that names what was wrong (file, line, key) and what
was expected. The command line prints the message without a traceback and exits
with status 2.
"""


class UserError(Exception):
  """Base of every error whose cause is input, not code."""


class ConfigError(UserError):
  """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
  """A data file cannot be read, or does not hold what it should."""


class CheckpointError(UserError):
  """A checkpoint is missing, damaged, or of another shape than expected."""
