"""Prints the table of losses: python -m dpo_jax.losses [--markdown]."""

import sys

from dpo_jax.losses import table

print(table(markdown="--markdown" in sys.argv, link="dpo_jax/losses"))
