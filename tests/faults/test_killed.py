"""Kills without warning, at any moment: nothing but time is lost."""

import random
import time

import pytest

from faults.launch import STEPS_OF_TWO, checksums, launch, rows, saved

pytestmark = pytest.mark.slow

STEPS = 120
SAVES_OFTEN = (
  f"--config.train.steps={STEPS}",
  "--config.train.checkpoint_every=1",
  "--config.train.log_every=20",
)


def left(workdir):
  """What an interrupted save left behind."""
  return [
    p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()
  ]


@pytest.fixture(scope="module")
def whole(corpus, xla, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  assert launch(corpus, workdir, *SAVES_OFTEN, cache=xla).wait() == [0]
  return workdir


def test_twenty_kills_at_random_moments_change_no_bit(
  corpus, xla, whole, tmp_path
):
  """Each attempt is killed 0 to 0.4 s after its first new checkpoint, so that
  what the kill meets is a loop that takes and saves a step every few ms."""
  rng, workdir = random.Random(0), tmp_path / "run"
  done, kills = 0, 0
  while kills < 20:
    run = launch(corpus, workdir, *SAVES_OFTEN, cache=xla)
    run.until_saved(done + 1)
    time.sleep(rng.uniform(0, 0.4))
    run.kill()
    if run.wait()[0] == 0:
      break  # it was too quick for twenty
    kills += 1
    newest = saved(workdir)[-1]
    assert newest > done, "an attempt went back behind what was saved"
    done = newest
  assert kills >= 10
  assert launch(corpus, workdir, *SAVES_OFTEN, cache=xla).wait() == [0]
  assert checksums(workdir) == checksums(whole)
  assert rows(workdir) == rows(whole)
  assert left(workdir) == []


def test_kills_of_either_of_two_processes_change_no_bit(
  corpus, xla, straight_of_two, tmp_path
):
  options = {"processes": 2, "cache": xla, "heartbeat": 5}
  flags = (STEPS_OF_TWO, "--config.train.checkpoint_every=2")
  workdir = tmp_path / "run"
  rng, done = random.Random(1), 0
  for kill in range(4):
    run = launch(corpus, workdir, *flags, **options)
    run.until_saved(done + 1)
    time.sleep(rng.uniform(0, 0.2))
    run.kill(process=kill % 2)
    ends = run.wait(seconds=40)
    assert ends[kill % 2] == -9 and ends[1 - kill % 2] not in (0, 75)
    done = saved(workdir)[-1]
  assert launch(corpus, workdir, *flags, **options).wait() == [0, 0]
  assert checksums(workdir) == checksums(straight_of_two)
  assert rows(workdir) == rows(straight_of_two)
  assert left(workdir) == []
