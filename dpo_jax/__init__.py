"""Direct preference optimization in JAX.

`from dpo_jax import losses` needs jax alone; training needs the `train` extra.
"""

__version__ = "0.1.0"
