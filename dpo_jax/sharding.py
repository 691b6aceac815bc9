"""The mesh and where each array lies on it. Rules are data.

Axes: `data` replicates the weights, `fsdp` shards them and gathers each layer
where it is used, `tensor` splits heads and ffn. The rows of a batch are split
over data and fsdp together, so a pair never crosses devices.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.errors import ConfigError

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# First match wins; specs are for one layer (the stacked layer axis, in front,
# is never split). They fit parameters and, by the end of the path, the
# optimizer's copies of them.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
  (r"(embed|unembed)$", P("tensor", "fsdp")),
  (r"attention/[qkv]/kernel$", P("fsdp", "tensor", None)),
  (r"attention/[qkv]/bias$", P("tensor", None)),
  (r"attention/o/kernel$", P("tensor", None, "fsdp")),
  (r"mlp/(gate|up)/kernel$", P("fsdp", "tensor")),
  (r"mlp/(gate|up)/bias$", P("tensor")),
  (r"mlp/down/kernel$", P("tensor", "fsdp")),
  (r"mlp/router/kernel$", P("fsdp", None)),
  (r"mlp/experts/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
  (r"mlp/experts/down/kernel$", P(None, "tensor", "fsdp")),
  # Adapters are small: split only where what they multiply is.
  (r"attention/[qkv]/b$", P(None, "tensor", None)),
  (r"attention/o/a$", P("tensor", None, None)),
  (r"mlp/(gate|up)/b$", P(None, "tensor")),
  (r"mlp/down/a$", P("tensor", None)),
  (r"", P()),
)


# The parts of a kernel in few bits lie as the kernel does.
_PACKED = re.compile(r"/kernel/(qvalue|scale)$")


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh over all devices; one size may be -1, "the rest".

  Where devices come in several slices (TPU pods over a network, GPU hosts),
  `data` goes across these, so that what fsdp and tensor move stays inside.

  Args:
    data: copies of the weights.
    fsdp: parts of the weights.
    tensor: parts of heads and ffn.
    devices: all of jax if None.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or cannot
      be laid over slices: these differ in size, or are TPUs and more than
      `data` has room for.
  """
  sizes = [data, fsdp, tensor]
  devices = jax.devices() if devices is None else list(devices)
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    raise ConfigError(
      f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover the"
      f" {len(devices)} devices; the sizes should multiply to {len(devices)}"
      " (one may be -1)"
    )
  return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(sizes, devices) -> np.ndarray:
  """Devices in the shape of the mesh."""
  counts = collections.Counter(getattr(d, "slice_index", 0) for d in devices)
  if len(set(counts.values())) > 1:
    raise ConfigError(
      f"slices of {sorted(counts.values())} devices cannot make one mesh; they"
      " should be of one size"
    )
  n, (data, fsdp, tensor) = len(counts), sizes
  # As `jax.make_mesh` has it, which refuses more than one slice.
  split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
  options = {"devices": devices, "allow_split_physical_axes": split}
  if n > 1 and data % n == 0:
    inner, outer = (data // n, fsdp, tensor), (n, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, **options)
  if n > 1 and devices[0].platform == "tpu":
    raise ConfigError(
      f"mesh data={data}, fsdp={fsdp}, tensor={tensor} over {n} slices: data"
      f" should be a multiple of {n}, for fsdp and tensor stay inside a slice"
    )
  # GPU hosts are slices, too, and fsdp may span them.
  return mesh_utils.create_device_mesh(sizes, **options)


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The spec of an array by its path; axes that do not divide are dropped.

  >>> spec_for("params/layers/mlp/up/kernel", (2, 64, 256), mesh)
  PartitionSpec(None, 'fsdp', 'tensor')
  """
  path = _PACKED.sub("/kernel", path)
  rule = next(spec for pattern, spec in RULES if re.search(pattern, path))
  if len(shape) < len(rule):  # a factor of adafactor's, or its placeholder
    return P()
  axes = [None] * (len(shape) - len(rule)) + list(rule)
  return P(
    *(
      axis if axis and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    )
  )


def shard_tree(tree: Any, mesh: Mesh) -> Any:
  """NamedSharding of every leaf (arrays or shapes), by `RULES`."""

  return _map_paths(
    lambda path, x: NamedSharding(mesh, spec_for(path, x.shape, mesh)), tree
  )


def placed(tree: Any, mesh: Mesh) -> Any:
  """Shapes and dtypes of a tree, with where each lies by `RULES`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shard_tree(tree, mesh),
  )


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """bool[rows]: which rows of a batch lie on this process's devices, as
  `put_batch` splits them."""
  mine = np.zeros(rows, bool)
  for (some,) in (
    _by_rows(mesh).addressable_devices_indices_map((rows,)).values()
  ):
    mine[some] = True
  return mine


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Numpy batch to arrays split over its rows. Each process hands its devices
  their rows and reads no others of the batch, see `local_rows`."""
  sharding = _by_rows(mesh)

  def put(x):
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(put, batch)


def batch_shapes(batch: Any, mesh: Mesh) -> Any:
  """What `put_batch` gives, as shapes."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_by_rows(mesh)),
    batch,
  )


def _by_rows(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(BATCH))


@dataclasses.dataclass(frozen=True)
class Pins:
  """What the model is told of the mesh: constraints, no axis names."""

  mesh: Mesh

  def for_model(self) -> dict[str, Any]:
    """The fields of `models.shape.Compute` that say what follows."""
    many = self.mesh.size > 1
    return {
      "pin_activations": self.activations,
      "pin_weights": self.weights,
      # Where nothing is gathered, doing it again would cost and save nothing.
      "pin_again": self.mesh.shape["fsdp"] > 1,
      "copy_weights": self.copies if many else None,
      "place_lookup": self.lookup,
      "place_experts": self.experts,
      "place_attention": self.attention,
    }

  def activations(self, x: jax.Array) -> jax.Array:
    """Pins f[B ...] to the batch axes, or GSPMD may move tokens of a pair."""
    return self._pin(x, self._rows(x))

  def weights(self, weights: Any, dtype: Any = None) -> Any:
    """Gathers one layer's weights over fsdp, here and not earlier.

    Args:
      weights: of one layer, split as `RULES` say.
      dtype: what they are used in; those that are gathered are cast first, and
        pinned as they lie, or they would be gathered as they were.
    """

    def one(path, leaf):
      split, whole = self._specs(path, leaf)
      if dtype is not None and split != whole and not _PACKED.search(path):
        leaf = self._pin(leaf.astype(dtype), split)
      return self._pin(leaf, whole)

    return _map_paths(one, weights)

  def copies(self, weights: jax.Array, dtype: Any = None) -> jax.Array:
    """f[V D] to f[n V D], one on each of n devices: cast, gathered once for all
    uses, and the gradients of these added up on the device, then over devices
    once."""
    split, _ = self._specs("embed", weights)
    weights = self._pin(weights.astype(dtype or weights.dtype), split)
    each = jnp.broadcast_to(weights, (self.mesh.size, *weights.shape))
    return self._pin(each, P(AXES))

  def lookup(self, function: Any) -> Any:
    """Runs `function(table f[V D], tokens i32[B T])` on local tokens, with the
    device's own of the `copies`."""

    def run(tables, tokens):
      rows = self._rows(tokens)
      return jax.shard_map(
        lambda tables, tokens: function(tables[0], tokens),
        mesh=self.mesh,
        in_specs=(P(AXES), rows),
        out_specs=rows,
        check_vma=False,
      )(tables, tokens)

    return run

  def head(self, function: Any) -> Any:
    """Runs `function(hidden f[B S D], head f[V D], target i32[B S])` on local
    scored tokens with the whole head (or its `copies`): no collective inside
    its loop, and one reduction of the head's gradient after it."""
    split = P(BATCH, "tensor")

    def run(hidden, head, target):
      heads = head if head.ndim == 3 else self.copies(head)
      return jax.shard_map(
        lambda hidden, heads, target: function(hidden, heads[0], target),
        mesh=self.mesh,
        in_specs=(P(BATCH, "tensor", None), P(AXES), split),
        out_specs=split,
        check_vma=False,
      )(hidden, heads, target)

    return run

  @property
  def sweep(self) -> Any:
    """Wraps `function(hidden f[B S D], head f[V D], given)` to a tree of sums
    over rows (`one_sweep.one_sweep`) likewise: each device sums its own rows.
    None where `tensor` splits the tokens of a row."""
    return self._sweep if self.mesh.shape["tensor"] == 1 else None

  def _sweep(self, function):
    def local(hidden, heads, given):
      sums = function(hidden, heads[0], given)
      return jax.tree.map(lambda x: x[None], sums)

    def run(hidden, head, given):
      heads = head if head.ndim == 3 else self.copies(head)
      rows = P(BATCH)
      specs = type(given)(rows, rows, P())
      sums = jax.shard_map(
        local,
        mesh=self.mesh,
        # An axis that no spec names would have its gradients added up.
        in_specs=(P(BATCH, "tensor"), P(AXES), specs),
        out_specs=rows,
        check_vma=False,
      )(hidden, heads, given)
      return jax.tree.map(lambda x: x.sum(axis=0), sums)

    return run

  def attention(self, function: Any) -> Any:
    """Runs `function(q f[B T H h], k f[B U K h], v, key_start i32[B T],
    key_end, window=)` on local rows and, where `tensor` splits the kv heads
    evenly, on local heads."""

    def run(q, k, v, key_start, key_end, window=None):
      rows = self._rows(q)
      whole = k.shape[2] % self.mesh.shape["tensor"]
      heads = P(*(rows or (None,)), None, None if whole else "tensor")
      return jax.shard_map(
        lambda *inputs: function(*inputs[:5], window=inputs[5]),
        mesh=self.mesh,
        in_specs=(heads, heads, heads, rows, rows, rows),
        out_specs=heads,
        check_vma=False,
      )(q, k, v, key_start, key_end, window)

    return run

  def experts(self, function: Any) -> Any:
    """Runs `function(x f[B T D], probs f32[B T E], kernels)` (see
    `models.moe.run_experts`) on local tokens, which a sort over all would move
    between devices. Each device of `tensor` has a part of the experts' ffn and
    so of the sums that the first output is."""

    def run(x, probs, kernels):
      rows = self._rows(x)
      specs = self._gathered(kernels, "mlp/experts/")
      parts = "tensor" if "tensor" in specs["down"]["kernel"] else None

      def local(*inputs):
        y, chosen = function(*inputs)
        return y[None], chosen

      # Added outside: the gradient of a sum inside would be added once more.
      y, chosen = jax.shard_map(
        local,
        mesh=self.mesh,
        in_specs=(rows, rows, specs),
        out_specs=(P(parts, *rows), rows),
        check_vma=False,
      )(x, probs, kernels)
      return y.sum(axis=0), chosen

    return run

  def _pin(self, x, spec):
    place = NamedSharding(self.mesh, spec)
    return jax.lax.with_sharding_constraint(x, place)

  def _rows(self, x):
    whole = x.shape[0] % batch_shards(self.mesh) == 0
    return P(BATCH) if whole else P()

  def _gathered(self, weights, under=""):
    """Specs of a layer's weights that lie whole on every device of fsdp."""
    return _map_paths(lambda p, x: self._specs(under + p, x)[1], weights)

  def _specs(self, path, leaf):
    """How a layer's weights lie, and how they do gathered over fsdp."""
    split = spec_for(path, leaf.shape, self.mesh)
    return split, P(*(None if axis == "fsdp" else axis for axis in split))


def _map_paths(function, tree):
  """`function(path, leaf)` of every leaf."""

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return function(name, leaf)

  return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())
