"""The files that a sweep ends with."""

from collections.abc import Sequence

from dpo_jax.sweep.options import Sweep
from dpo_jax.sweep.table import Row, to_csv, to_markdown


def write_tables(sweep: Sweep, rows: Sequence[Row]) -> None:
  """Writes table.csv and table.md into the directory of the sweep."""
  sweep.root.mkdir(parents=True, exist_ok=True)
  for name, text in (
    ("table.csv", to_csv(rows)),
    ("table.md", to_markdown(rows)),
  ):
    part = sweep.root / f"{name}.part"
    part.write_text(text, encoding="utf-8")
    part.replace(sweep.root / name)
