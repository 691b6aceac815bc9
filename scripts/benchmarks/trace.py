"""What a profiler trace says of a step: time by kind, and the longest ops."""

import collections
import pathlib
import re

# The first that is found in a name; of NVIDIA's and XLA's names.
_KINDS = {
  "attention kernel": r"flash|attention|fmha|^(forward|dq|dkv)_kernel",
  "matrix product": r"gemm|cutlass|cublas|nvjet|wgmma|\bdot|matmul|ynn",
  "copy": r"memcpy|memset|copy|transpose",
}
_OURSELVES = ("Threadpool", "end: ", "$", "ThunkExecutor", "Execute")


def summary(folder: str, most: int = 12) -> dict:
  """Reads the newest trace of a folder.

  Args:
    folder: where `jax.profiler.start_trace` wrote.
    most: names to list.

  Returns:
    "kinds" and "ops": milliseconds by kind and by name, an op's time being what
    no op within it took; over all streams of the accelerator, or else over the
    threads of XLA's CPU client.
  """
  import jax

  files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
  data = jax.profiler.ProfileData.from_file(str(files[-1]))
  planes = list(data.planes)
  lines = [
    line
    for plane in planes
    if plane.name.startswith("/device:")
    for line in plane.lines
    if line.name.startswith(("Stream", "XLA Ops"))
  ] or [
    line
    for plane in planes
    if plane.name.startswith("/host:")
    for line in plane.lines
    if line.name.startswith("tf_XLA")
  ]
  ops = collections.Counter()
  for line in lines:
    events = [
      (event.start_ns, event.duration_ns, event.name)
      for event in line.events
      if not event.name.startswith(_OURSELVES)
    ]
    ops.update(self_times(events))
  kinds = collections.Counter()
  for name, nanoseconds in ops.items():
    kinds[kind(name)] += nanoseconds
  return {
    "kinds": {k: ns / 1e6 for k, ns in kinds.most_common()},
    "ops": {k: ns / 1e6 for k, ns in ops.most_common(most)},
  }


def self_times(events: list[tuple[float, float, str]]) -> dict[str, float]:
  """Of (start, duration, name) on one line, the time by name that no event
  within took; numbers at the end of a name are left off."""
  found = collections.Counter()
  open_ones: list[tuple[float, str]] = []  # end, name
  for start, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
    name = re.sub(r"[._]\d+$", "", name)
    while open_ones and open_ones[-1][0] <= start:
      open_ones.pop()
    if open_ones:
      found[open_ones[-1][1]] -= duration
    found[name] += duration
    open_ones.append((start + duration, name))
  return dict(found)


def kind(name: str) -> str:
  """Of an op, by its name: what it mostly is."""
  for found, pattern in _KINDS.items():
    if re.search(pattern, name, re.IGNORECASE):
      return found
  return "other"
