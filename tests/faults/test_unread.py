"""Runs whose output nobody reads, as in `train.py 2>&1 | head -1`."""

import pytest

from faults.launch import checksums, launch, saved


@pytest.mark.slow
def test_a_run_that_nobody_reads_stops_continues_refuses_and_ends_as_any(
  corpus, xla, straight, tmp_path
):
  workdir, options = tmp_path / "run", {"cache": xla, "unread": True}
  assert launch(corpus, workdir, fault="term 0 4", **options).wait() == [75]
  assert saved(workdir) == [4]
  other = "--config.loss.beta=0.7"
  assert launch(corpus, workdir, other, **options).wait() == [2]
  assert launch(corpus, workdir, **options).wait() == [0]
  assert checksums(workdir) == checksums(straight)
  assert (workdir / "summary.json").exists()
