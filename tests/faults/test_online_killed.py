"""PPO, killed and spread over devices and processes: it answers the same."""

import json

import numpy as np
import pytest

from faults.launch import checksums, launch, rows, saved

pytestmark = pytest.mark.slow

STEPS, ANSWERS = 10, 8 * 2
FLAGS = (
  "--config.online.method=ppo",
  "--config.online.reward=tests.faults.rewards:vowels",
  "--config.online.max_tokens=8",
  "--config.online.group=2",
  "--config.online.epochs=2",
  "--config.online.minibatches=2",
  "--config.online.kl_target=0.5",
  "--config.online.kl_horizon=100",
  "--config.data.eval_rows=0",
  "--config.data.row_length=0",
  "--config.data.max_length=96",
  "--config.data.max_prompt_length=72",
  "--config.optim.learning_rate=1e-2",
  "--config.train.batch_size=8",
  f"--config.train.steps={STEPS}",
  "--config.train.checkpoint_every=1",
)


@pytest.fixture
def start(corpus, xla, monkeypatch, tmp_path):
  """Starts a run, and says where its reward takes down what it was asked."""

  def start(name, *flags, workdir=tmp_path / "run", **options):
    asked = tmp_path / f"{name}.jsonl"
    monkeypatch.setenv("ASKED", str(asked))
    run = launch(corpus, workdir, *FLAGS, *flags, cache=xla, **options)
    return run, asked

  return start


def read(asked):
  return [json.loads(line) for line in asked.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(corpus, xla, tmp_path_factory):
  """Work directory of a run that nothing happened to, and what it asked."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  asked = workdir.with_name("asked.jsonl")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ASKED", str(asked))
    assert launch(corpus, workdir, *FLAGS, cache=xla).wait() == [0]
  asked = read(asked)
  assert len(asked) == STEPS * ANSWERS
  return workdir, asked


def test_a_killed_run_gives_the_same_answers_and_weights(whole, start):
  straight, all_asked = whole
  done = 0
  for attempt in range(2):
    run, asked = start(f"killed{attempt}")
    run.until_saved(done + 2)
    run.kill()
    assert run.wait() == [-9]
    said = read(asked)
    first = done * ANSWERS
    # The kill may come in the middle of a step's answers.
    assert said == all_asked[first : first + len(said)]
    assert done < saved(run.workdir)[-1] < STEPS
    done = saved(run.workdir)[-1]
  run, asked = start("last")
  assert run.wait() == [0]
  assert read(asked) == all_asked[done * ANSWERS :]
  assert checksums(run.workdir) == checksums(straight)
  assert rows(run.workdir) == rows(straight)
  prices = [r["objective/kl_coef"] for r in rows(straight) if "loss" in r]
  assert len(set(prices)) == STEPS  # adapted, and carried over the kills


@pytest.mark.parametrize(
  "flags, options",
  [
    (["--config.mesh.data=2", "--config.mesh.fsdp=4"], {"devices": 8}),
    ([], {"processes": 2}),
  ],
  ids=["eight devices", "two processes"],
)
def test_a_step_on_many_devices_answers_and_learns_the_same(
  whole, start, flags, options
):
  straight, all_asked = whole
  run, asked = start("many", "--config.train.steps=1", *flags, **options)
  assert set(run.wait(240)) == {0}
  assert read(asked) == all_asked[:ANSWERS]
  (want, *_), (got,) = (
    [row for row in rows(x) if row["split"] == "train"]
    for x in (straight, run.workdir)
  )
  for name in ("objective/scores", "objective/kl_coef", "rewards/failed"):
    assert got[name] == want[name]
  for name in ("loss", "loss/policy_avg", "loss/value_avg", "grad_norm"):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)
