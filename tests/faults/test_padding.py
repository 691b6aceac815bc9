"""A pair's log-probs do not depend on the room it is given, on its side of the
prompt, or on who else is in the batch."""

import json

import numpy as np
import pytest
from runs import compile_once, small_config  # noqa: F401

from dpo_jax import evaluate
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import load_examples
from dpo_jax.run import Run

pytestmark = pytest.mark.usefixtures("compile_quickly")
N = 12
CASES = [  # tokens a row, batch size
  (32, 1), (64, 1), (128, 1), (512, 1), (64, 5), (128, 12), (512, 12),
]  # fmt: skip


def rows():
  rng = np.random.default_rng(0)
  word = lambda n: "".join(rng.choice(list("abcdefg "), n)) + "."
  return [
    {
      "prompt": word(rng.integers(1, 8)),
      "chosen": word(rng.integers(1, 9)),
      "rejected": word(rng.integers(1, 9)) + "!",
    }
    for _ in range(N)
  ]


@pytest.fixture(scope="module", params=["blockwise", "dense"])
def made(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("padding") / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, rows())))
  config = small_config(
    {"pairs": path},
    **{"data.eval_rows": 0, "data.row_length": 32,
       "model.attention": request.param, "train.batch_size": 1},
  )  # fmt: skip
  run = Run(config)
  state, _ = run.start()

  def score(examples, row_length, size):
    plan = Plan(examples, batch_size=size, shuffle=False, row_length=row_length)
    return evaluate.score_examples(
      run.built.score, state.params, plan, run.built.mesh
    ).logps

  base = score(run.data.train, 32, 1)
  assert base.shape == (N, 2) and (base < -1).all()
  return run, score, base, path


def close(got, want):
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("row_length", "size"), CASES)
def test_the_padding_of_a_row_and_its_other_pairs_change_nothing(
  made, row_length, size
):
  run, score, base, _ = made
  close(score(run.data.train, row_length, size), base)


@pytest.mark.parametrize("seed", range(3))
def test_other_mates_in_another_order_change_nothing(made, seed):
  run, score, base, _ = made
  order = np.random.default_rng(seed).permutation(N)
  close(score(run.data.train.select(order), 128, 5), base[order])


def test_right_of_the_prompt_and_left_of_it_are_the_same(made, tmp_path):
  """The chosen response lies right of it, the rejected one reversed and left,
  with what is padding for the one behind the other."""
  run, score, base, _ = made
  path = tmp_path / "swapped.jsonl"
  swapped = [
    r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows()
  ]
  path.write_text("\n".join(map(json.dumps, swapped)))
  settings = EncodeSettings(max_length=run.config.data.max_length)
  other = load_examples(str(path), "train", run.built.tokenizer, settings)
  for row_length, size in ((32, 1), (128, 12)):
    close(score(other, row_length, size)[:, ::-1], base)


def test_each_response_alone_has_the_same_log_prob(made, tmp_path):
  """As sft sees it: no second branch."""
  run, score, base, _ = made
  for side, key in enumerate(("chosen", "rejected")):
    path = tmp_path / f"{key}.jsonl"
    alone = [{"prompt": r["prompt"], "completion": r[key]} for r in rows()]
    path.write_text("\n".join(map(json.dumps, alone)))
    settings = EncodeSettings(max_length=run.config.data.max_length, kind="sft")
    other = load_examples(str(path), "train", run.built.tokenizer, settings)
    got = score(other, 64, 5)
    close(got[:, 0], base[:, side])
    assert not got[:, 1].any()
