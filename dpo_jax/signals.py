"""Turns SIGTERM and SIGINT into a flag that is read between steps."""

import logging
import signal
import threading

_LOG = logging.getLogger("dpo_jax")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
  """`with StopSignal() as stop:` sets `stop.requested` on the first signal; a
  second one acts as if nobody had caught it."""

  def __init__(self):
    self.requested = False
    self._before = {}

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        self._before[number] = signal.signal(number, self._caught)
    return self

  def __exit__(self, *exc_info: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _caught(self, number, frame) -> None:
    self.requested = True
    name = signal.Signals(number).name
    _LOG.warning("%s: saving after this step; once more ends at once", name)
    self.__exit__()
