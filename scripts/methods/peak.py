"""How much memory this process takes for something, as Linux counts it."""

import contextlib
import ctypes
import gc
import math
import pathlib
from collections.abc import Iterator

_SELF = pathlib.Path("/proc/self")


class Peak:
  """`rise`: bytes by which the most that was resident inside the block exceeds
  what was resident before it; NaN where the platform does not tell."""

  rise: float = math.nan


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
  """Measures a block. Freed memory is given back first, or it would hide what
  is taken from it."""
  found = Peak()
  gc.collect()
  try:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    (_SELF / "clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
  except (OSError, AttributeError):
    before = math.nan
  yield found
  if not math.isnan(before):
    found.rise = _status("VmHWM") - before


def _status(name: str) -> float:
  for line in (_SELF / "status").read_text().splitlines():
    key, _, value = line.partition(":")
    if key == name:
      return float(value.split()[0]) * 1024
  return math.nan
