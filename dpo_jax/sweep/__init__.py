"""Many runs of one config: which there are, what became of each.

A config file says which in a function beside its `get_config`:

  from dpo_jax import sweep

  def get_sweep():
    return sweep.product(
      sweep.listed("loss.name", "dpo", "ipo"),
      sweep.listed("loss.beta", 0.05, 0.1, 0.3),
    )
"""

from dpo_jax.sweep.grid import listed, product, zipped

__all__ = ["listed", "product", "zipped"]
