"""The table of a sweep, whether its runs are done or not."""

import csv
import io
import json

import pytest
from sweeps import sweep_of

from dpo_jax import sweep as grid
from dpo_jax.sweep.claims import claim
from dpo_jax.sweep.table import rows_of, to_csv, to_markdown
from dpo_jax.sweep.write import write_tables

SUMMARY = {
  "steps": 120,
  "final_eval": {"loss": 1 / 3, "rewards/accuracies": 0.75},
  "true_reward": {"before": 0.19, "after": 1.5},
  "kl_to_reference": None,
  "skipped_steps": 0,
  "wall_seconds": 61.5,
}


@pytest.fixture
def sweep(tmp_path):
  """One run that is done, one that is stopped, one that never started."""
  runs = grid.product(
    grid.listed("loss.name", "dpo"), grid.listed("loss.beta", 0.1, 0.2, 0.3)
  )
  sweep = sweep_of(tmp_path, runs)
  done, stopped, _ = (sweep.place(run) for run in sweep.runs)
  done.path.mkdir(parents=True)
  done.summary.write_text(json.dumps(SUMMARY))
  (stopped.checkpoints / "40").mkdir(parents=True)
  return sweep


def test_every_run_has_a_row_whatever_became_of_it(sweep):
  rows = rows_of(sweep)
  assert [row["state"] for row in rows] == ["done", "stopped", "never started"]
  assert [row["loss.beta"] for row in rows] == [0.1, 0.2, 0.3]
  assert rows[0]["loss"] == 1 / 3
  assert rows[0]["reward"] == 1.5
  assert rows[1]["loss"] is None
  # Columns that no run has a value for are left out.
  assert "kl" not in rows[0]
  assert "margin" not in rows[0]


def test_csv_has_the_numbers_in_full(sweep):
  rows = list(csv.DictReader(io.StringIO(to_csv(rows_of(sweep)))))
  assert [row["run"] for row in rows] == [run.id for run in sweep.runs]
  assert float(rows[0]["loss"]) == 1 / 3
  assert rows[1]["loss"] == ""
  assert rows[0]["loss.name"] == "dpo"


def test_markdown_has_them_as_a_person_writes_them(sweep):
  lines = to_markdown(rows_of(sweep)).splitlines()
  assert len(lines) == 2 + 3
  cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
  assert cells[:4] == ["dpo", "0.1", "done", "120"]
  assert "0.333" in cells
  assert cells[-1] == sweep.runs[0].id


def test_a_bar_in_a_value_does_not_make_a_column(tmp_path):
  sweep = sweep_of(tmp_path, grid.listed("optim.freeze", "embed|mlp"))
  lines = to_markdown(rows_of(sweep)).splitlines()
  assert "embed\\|mlp" in lines[2]


def test_a_run_that_is_claimed_is_running(sweep):
  held = claim(sweep.place(sweep.runs[2]).path)
  assert rows_of(sweep)[2]["state"] == "running"
  held.release()


def test_a_summary_that_cannot_be_read_is_a_row_without_results(sweep):
  sweep.place(sweep.runs[0]).summary.write_text("[1, 2")
  assert rows_of(sweep)[0]["state"] == "done"
  assert "loss" not in rows_of(sweep)[0]


def test_a_setting_that_only_some_runs_set_is_told_of_all(tmp_path):
  sweep = sweep_of(tmp_path, [{"seed": 1}, {"train.steps": 7}])
  rows = rows_of(sweep)
  assert [row["seed"] for row in rows] == [1, 0]
  assert [row["train.steps"] for row in rows] == [0, 7]


def test_tables_are_files_of_the_sweep(sweep):
  rows = rows_of(sweep)
  write_tables(sweep, rows)
  assert (sweep.root / "table.csv").read_text() == to_csv(rows)
  assert (sweep.root / "table.md").read_text() == to_markdown(rows)
