"""Runs a script of the repository as `python watched.py EVENTS SCRIPT ...` and
writes what it did that a stranger's input might want of it: JSON lines of code
that our own modules ran, of objects unpickled, of programs started and of calls
to the network, which all fail."""

import atexit
import json
import os
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
_OURS = (str(ROOT / "dpo_jax"), str(ROOT / "scripts"), str(ROOT / "configs"))
_NETWORK = (
  "socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
  "socket.sendto", "urllib.Request",
)  # fmt: skip
_PROGRAMS = (
  "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
)  # fmt: skip


def watch(events: str) -> None:
  found = []

  def hook(event, args):
    if event in _NETWORK:
      if not (args and str(getattr(args[0], "family", "")).endswith("UNIX")):
        found.append([event, repr(args)[:300]])
        raise OSError("no network in this test")
    elif event in _PROGRAMS or event == "pickle.find_class":
      found.append([event, repr(args)[:300]])
    elif event in ("exec", "compile"):
      caller = sys._getframe(1).f_code.co_filename
      if caller.startswith(_OURS):
        found.append([event, f"{caller}: {args!r:.300}"])

  def write():
    with open(events, "w") as file:
      file.writelines(json.dumps(one) + "\n" for one in found)

  atexit.register(write)
  sys.addaudithook(hook)


if __name__ == "__main__":
  watch(sys.argv[1])
  sys.argv = sys.argv[2:]
  os.chdir(ROOT)
  runpy.run_path(sys.argv[0], run_name="__main__")
