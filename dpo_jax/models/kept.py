"""What the forward keeps for the backward, told by name.

Left to itself, JAX keeps whatever a derivative reads: of a gated MLP the gate,
its sigmoid, its activation, the other factor and their product, six arrays of
F numbers a token with what products in between ask for. Kept by name are what
matrix products and attention made; what is between these is made again from
them, by the kernels that read it.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_PRODUCT = "product"
only_products = jax.checkpoint_policies.save_only_these_names(_PRODUCT)


def kept(tree: Any) -> Any:
  """The same arrays, which `only_products` keeps where a backward reads them
  (and `jax.checkpoint` without that policy does not)."""
  return jax.tree.map(lambda x: checkpoint_name(x, _PRODUCT), tree)
