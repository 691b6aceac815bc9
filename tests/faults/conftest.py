"""What the tests of faults share: a corpus, compiled programs, and a run that
nothing happened to."""

import pytest

from dpo_jax.data.corpus import write_corpus
from faults.launch import launch


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  place = tmp_path_factory.mktemp("corpus")
  write_corpus(place, pairs=64)
  return place


@pytest.fixture(scope="session")
def xla(tmp_path_factory):
  """Folder of compiled programs."""
  return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="session")
def straight(corpus, xla, tmp_path_factory):
  """Work directory of a run on one device from start to end."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  assert launch(corpus, workdir, cache=xla).wait() == [0]
  return workdir
