"""What a compiled program moves between devices, and the least it could.

Read off the text of the optimised HLO, loops times their trip count, so it
holds for what runs and not for what was meant. Bytes are of one device and one
step. The compiler for TPUs writes some things its own way: a sum of which each
device keeps a share is a fusion of its own name, what runs beside other work is
written once for every piece of that, and a loop says its length in its
condition alone.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "collective-permute",
  "all-to-all",
  "ragged-all-to-all",
  "collective-broadcast",
)
SUMS = ("reduce-scatter", "all-reduce")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(
  r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\("
)
_CALLED = re.compile(
  r"\b(body|condition|to_apply|calls|branch_computations|true_computation"
  r"|false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(
  r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\).*direction=LT"
)
_PIECE = re.compile(r"channel_id=(\d+).*chain_id=")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r'op_name="([^"]*)"')
# The three ways that groups of devices are written.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


class Collective(NamedTuple):
  """One operation of the program, on one device."""

  kind: str  # one of KINDS
  arrays: tuple[str, ...]  # as "f32[4,8]": what is gathered, or added up
  bytes: int  # of these, whole
  devices: int  # that take part together
  times: int  # that it runs in a step
  known: bool  # False inside a loop of unknown length, counted once
  name: str  # what it was in the source

  @property
  def received(self) -> float:
    """Bytes a device takes in, in a step, by the best known algorithm: a sum
    that every device gets is a reduce-scatter and an all-gather."""
    n = max(self.devices, 1)
    if self.kind == "collective-permute":
      return self.bytes * self.times
    both = 2 if self.kind == "all-reduce" else 1
    return both * self.bytes * self.times * (n - 1) / n


def read(hlo: str) -> list[Collective]:
  """The collectives of a program, but for those of a device with itself.

  Args:
    hlo: `compiled.as_text()`.

  Raises:
    ValueError: no program, or groups of devices in a notation not known here.
  """
  entry, parts = _computations(hlo)
  found: list[Collective] = []
  pieces: set[str] = set()

  def walk(name, times, known):
    # Of all that is added up here a device keeps its share.
    shares = name.startswith("all-reduce-scatter")
    for line in parts.get(name, ()):
      operation = _OPERATION.match(line)
      if operation is None:
        continue
      shape, op = operation.groups()
      kind = op.removesuffix("-start")
      if kind in KINDS and not _seen(line, pieces):
        one = _collective(line, shape, op, times, known)
        if shares:
          one = one._replace(kind="reduce-scatter")
        if one.devices != 1:  # over an axis of one, this compiler leaves them
          found.append(one)
      loops, certain = times, known
      if op == "while":
        trips = _trips(line, parts)
        loops, certain = times * (trips or 1), known and trips is not None
      for role, called in _CALLED.findall(line):
        if role == "to_apply" and op != "call":
          continue  # the sum of a reduction
        for inner in called.strip("{}").split(","):
          walk(inner.strip().lstrip("%"), loops, certain)

  walk(entry, 1, True)
  return found


def _seen(line, pieces) -> bool:
  """Whether this is a further piece of one that is counted."""
  piece = _PIECE.search(line)
  if piece is None:
    return False
  before = piece[1] in pieces
  pieces.add(piece[1])
  return before


def _trips(line, parts) -> int | None:
  """How often a loop runs, which is said with it or, for one that counts from
  0, by what its condition compares with."""
  if said := _TRIPS.search(line):
    return int(said[1])
  condition = next(
    x for role, x in _CALLED.findall(line) if role == "condition"
  )
  lines = parts.get(condition.lstrip("%"), ())
  limit = next(filter(None, map(_LIMIT.search, lines)), None)
  if limit is None:
    return None
  number = rf"^\s+%?{re.escape(limit[1])} = s32\[\]\S* constant\((\d+)\)"
  found = next(filter(None, (re.search(number, x) for x in lines)), None)
  return found and int(found[1])


def _computations(hlo):
  entry, parts, name = None, {}, None
  for line in hlo.splitlines():
    start = _COMPUTATION.match(line)
    if start and not line.startswith("HloModule"):
      name = start[2]
      parts[name] = []
      entry = name if start[1] else entry
    elif name is not None:
      parts[name].append(line)
  if entry is None:
    raise ValueError("no entry computation; expected the text of a program")
  return entry, parts


def _collective(line, shape, op, times, known):
  kind = op.removesuffix("-start")
  arrays = _ARRAY.findall(shape)
  if op.endswith("-start") and kind != "all-reduce":
    # (operands, results): what it works on and what comes out; of a permute
    # (operand, result, ...).
    half = len(arrays) // 2
    arrays = arrays[1:2] if kind == "collective-permute" else arrays[half:]
  devices = _group_size(line) if kind != "collective-permute" else 2
  size = sum(map(_bytes, arrays))
  if kind == "reduce-scatter":  # what comes out is a share
    size *= devices
  name = _NAME.search(line)
  return Collective(
    kind, tuple(f"{d}[{s}]" for d, s in arrays), size, devices, times, known,
    name[1] if name else "",
  )  # fmt: skip


def _bytes(array):
  dtype, dims = array
  bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
  return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _group_size(line):
  if match := _LISTED.search(line):
    return len(match[1].split(","))
  if match := _IOTA.search(line):
    return int(match[2])
  if match := _MESH.search(line):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'([^']*)'", match[2]))
  raise ValueError(f"replica groups in an unknown notation: {line.strip()}")


class Moved(NamedTuple):
  """Totals of some collectives."""

  count: int  # times that one runs
  bytes: int  # whole arrays
  received: float  # see `Collective.received`


def total(collectives: Iterable[Collective], *kinds: str) -> Moved:
  """Of the kinds named, or of all."""
  some = [c for c in collectives if not kinds or c.kind in kinds]
  return Moved(
    sum(c.times for c in some),
    sum(c.bytes * c.times for c in some),
    sum(c.received for c in some),
  )


class Least(NamedTuple):
  """What a step must move, by where the weights lie."""

  gathered: float  # bytes a device takes in to have the weights whole
  summed: int  # bytes of gradients that are added up over devices


def least(
  policy: Any, trained: Any, *, reference: bool, itemsize: int
) -> Least:
  """The least of weights and gradients for one step without microbatches.

  A layer's weights are gathered over fsdp for the policy's forward, for its
  backward and for the reference; what lies at the two ends of the model,
  embedding and head, over fsdp and tensor once for policy and once for
  reference. Each gradient is added up once. What the tensor axis adds up of
  activations is not in it.

  Args:
    policy: `params` of the model, shapes with shardings.
    trained: variables that have gradients, likewise.
    reference: whether a reference is scored in the step.
    itemsize: bytes of a number that is gathered or of a gradient of such;
      others are added up as they are.
  """
  gathered = 0.0
  for path, leaf in _leaves(policy):
    in_layer = "layers" in path
    passes = (2 if in_layer else 1) + reference
    n = _parts(leaf, "fsdp", *(() if in_layer else ("tensor",)))
    gathered += passes * _size(leaf, in_layer) * itemsize * (n - 1) / n
  summed = sum(
    _size(leaf, "layers" in path)
    * (itemsize if _parts(leaf, "fsdp") > 1 else leaf.dtype.itemsize)
    for path, leaf in _leaves(trained)
  )
  return Least(gathered, summed)


def _leaves(tree):
  if isinstance(tree, dict):
    return [
      ((key, *path), leaf)
      for key, value in tree.items()
      for path, leaf in _leaves(value)
    ]
  return [((), tree)]


def _parts(leaf, *axes):
  """Into how many parts an array is split along axes of the mesh."""
  sizes = leaf.sharding.mesh.shape
  return math.prod(sizes[a] for a in leaf.sharding.spec if a in axes)


def _size(leaf, in_layer):
  """Numbers in an array, or in the part of it that a device of tensor uses."""
  return math.prod(leaf.shape) // (_parts(leaf, "tensor") if in_layer else 1)
