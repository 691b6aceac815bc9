"""A run as a process below the sweep."""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from dpo_jax.sweep.claims import Claim
from dpo_jax.sweep.options import shell
from dpo_jax.sweep.status import Place

_WITH_PARENT = pathlib.Path(__file__).with_name("with_parent.py")


class Child:
  """Starts a run and notes how it ends; to be made in the main thread, whose
  end would stop the run.

  The run has a session of its own, so that Ctrl-C reaches it once, through the
  sweep. If the sweep is killed, it is asked to stop and saves its checkpoint.
  """

  def __init__(
    self,
    command: Sequence[str],
    place: Place,
    claim: Claim,
    environment: Mapping[str, str],
  ):
    self._place, self._claim, self._asked = place, claim, 0
    place.begin_attempt()
    self.first_step = place.step()
    watched = [sys.executable, "-I", str(_WITH_PARENT), str(os.getpid())]
    with place.log.open("ab") as log:
      log.write(f"$ {shell(command, environment)}\n".encode())
      log.flush()
      self._process = subprocess.Popen(
        [*watched, *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        pass_fds=[claim.file],
        start_new_session=True,
      )

  def stop(self, times: int = 1) -> None:
    """Asks it to save and end, unless it was asked so many times; the second
    ends it at once."""
    if self._asked < times:
      self._asked += 1
      self._process.send_signal(signal.SIGTERM)  # nothing if it has ended

  def poll(self) -> int | None:
    """Its exit status once it has ended, minus a signal that ended it."""
    status = self._process.poll()
    if status is None or self._claim is None:
      return status
    self._place.end_attempt(status)
    self._claim.release()
    self._claim = None
    return status
