"""The files that a sweep ends with."""

from collections.abc import Sequence

from dpo_jax.files import write_whole
from dpo_jax.sweep.options import Sweep
from dpo_jax.sweep.page import render_page
from dpo_jax.sweep.table import Row, to_csv, to_markdown


def write_tables(sweep: Sweep, rows: Sequence[Row]) -> None:
  """Writes table.csv, table.md and sweep.html, each whole or not at all."""
  sweep.root.mkdir(parents=True, exist_ok=True)
  for name, content in (
    ("table.csv", to_csv(rows)),
    ("table.md", to_markdown(rows)),
    ("sweep.html", render_page(sweep, rows)),
  ):
    write_whole(sweep.root / name, content)
