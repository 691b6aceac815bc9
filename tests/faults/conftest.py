"""What the tests of faults share, also over the processes of pytest-xdist: a
corpus, compiled programs, and runs that nothing happened to."""

import fcntl
import os
import shutil

import pytest

from dpo_jax.data.corpus import write_corpus
from faults.launch import STEPS_OF_TWO, launch


@pytest.fixture(scope="session")
def once(tmp_path_factory):
  """`once(name, make)`: a folder of all processes of this test run, made by
  the first one that asks; the others wait."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  (base / "faults").mkdir(exist_ok=True)

  def find(name, make):
    place = base / "faults" / name
    with (base / "faults" / f"{name}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      made = place.with_suffix(".made")
      if not made.exists():
        shutil.rmtree(place, ignore_errors=True)  # of one who failed
        make(place)
        made.touch()
    return place

  return find


@pytest.fixture(scope="session")
def corpus(once):
  return once("corpus", lambda place: write_corpus(place, pairs=64))


@pytest.fixture(scope="session")
def xla(once):
  """Folder of compiled programs."""
  return once("xla", lambda place: place.mkdir())


@pytest.fixture(scope="session")
def straight(once, corpus, xla):
  """Work directory of a run on one device from start to end."""

  def run(workdir):
    assert launch(corpus, workdir, cache=xla).wait() == [0]

  return once("straight", run)


@pytest.fixture(scope="session")
def straight_of_two(once, corpus, xla):
  """Work directory of a run of two processes from start to end."""

  def run(workdir):
    flags = (STEPS_OF_TWO, "--config.train.checkpoint_every=0")
    two = launch(corpus, workdir, *flags, processes=2, cache=xla)
    assert two.wait() == [0, 0]

  return once("straight_of_two", run)
