"""Runs a command that is asked to stop when its parent dies, however it dies.

  python with_parent.py PARENT COMMAND...

Linux only; elsewhere the command runs alone. A file of its own that imports
nothing of the package: it runs before each run, and is gone when that starts.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); outlives exec


def main(argv: list[str]) -> None:
  """Never returns: becomes the command."""
  parent, command = int(argv[1]), argv[2:]
  if sys.platform == "linux":
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before it was watched
      sys.exit(1)
  os.execvp(command[0], command)


if __name__ == "__main__":
  main(sys.argv)
