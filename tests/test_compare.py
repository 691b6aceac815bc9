"""The comparison of several policies: one measure, a table, a picture."""

import contextlib
import json
import math
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import compare_losses
from configs import losses as any_loss
from dpo_jax import compare as compare_module
from dpo_jax import losses
from dpo_jax.build import build
from dpo_jax.compare import Row, compare, losses_to_compare
from dpo_jax.config import Config, Data, Model, Sample, Train, from_dict
from dpo_jax.models import hf
from dpo_jax.report import comparison
from dpo_jax.weights import load_variables

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def reward(prompt, response):
  return float(len(response))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A tiny model, one moved a little from it, and 12 pairs."""
  root = tmp_path_factory.mktemp("compare")
  shape = Model(
    tokenizer="bytes", width=8, layers=1, heads=2, kv_heads=1, ffn=8
  )
  built = build(Config(model=shape))
  start = load_variables(Config(model=shape), built)
  rng = np.random.default_rng(0)
  moved = jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype("f4"), start
  )
  for name, variables in (("start", start), ("moved", moved)):
    hf.save_checkpoint(
      root / name, built.family, built.model.config, variables,
      save_tokenizer=built.tokenizer.save,
    )  # fmt: skip
  rows = [
    {"prompt": f"Q{i}:", "chosen": "a" * (1 + i % 5), "rejected": "bc" * 3}
    for i in range(12)
  ]
  file = root / "pairs.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return root


@pytest.fixture(scope="module")
def rows(folders):
  config = Config(
    model=Model(path=str(folders / "start")),
    data=Data(
      source=str(folders / "pairs.jsonl"),
      max_length=32,
      cache_dir="",
      eval_rows=9,
    ),
    loss={"name": "simpo"},  # of no account
    train=Train(batch_size=4),
    sample=Sample(prompts=6, max_tokens=8, reward="test_compare:reward"),
  )
  names = ("moved", "start")
  return compare(config, {name: str(folders / name) for name in names})


def test_the_start_is_judged_first_and_has_moved_nowhere(rows):
  assert [row.name for row in rows] == ["start", "moved", "start"]
  first, moved, again = rows
  assert first == again
  assert (first.kl, first.margin, first.accuracy) == (0.0, 0.0, 0.5)
  assert (first.chosen, first.rejected) == (0.0, 0.0)
  assert abs(moved.kl) > 0.01 and moved.accuracy != 0.5


def test_margins_are_differences_of_the_changes_in_nats(rows):
  for row in rows:
    assert row.margin == pytest.approx(row.chosen - row.rejected, abs=1e-5)
    assert 0 < row.tokens <= 8 and row.reward_error >= 0


def test_all_losses_that_train_a_policy_are_compared():
  names = losses_to_compare()
  assert set(names) == set(losses.names()) - {"reward"}
  for name in (*names, "dpo+0.1*sft"):
    config = from_dict(compare_losses.get_config(f"loss={name}").to_dict())
    made = config.make_loss()
    assert made.name == name
    source = {"ranked": "rankings"}.get(made.kind, "pairs")
    assert config.data.source == f"runs/compare/data/{source}.jsonl"
  for name, options in compare_losses.OPTIONS.items():
    assert options.keys() <= losses.defaults(name).keys()


def test_any_loss_has_a_config_to_start_from():
  for name in (*losses_to_compare(), "0.8*dpo+0.2*bco_pair+sft"):
    config = from_dict(any_loss.get_config(name).to_dict())
    assert config.make_loss() == losses.make(name)
    assert 1e-7 < config.optim.learning_rate < 1e-4
  assert any_loss.LEARNING_RATES.keys() <= set(losses.names())
  assert any_loss.get_config().loss.name == "dpo"
  with pytest.raises(ValueError, match="did you mean 'simpo'"):
    any_loss.get_config("simppo")


SOME = [
  Row("start & <all>", 0.5, 0.1, 0.5, 0.0, 0.0, 0.0, 0.0, 30.0),
  Row("dpo", 1.5, 0.05, 0.7, 1.0, -3.0, -4.0, 2.0, 31.0),
  Row("none", math.nan, math.nan, 0.6, 0.5, 0.5, 0.0, math.nan, 30.0),
]


def test_the_picture_has_a_dot_for_every_number_in_its_place():
  panels = [
    comparison.Panel(
      "Reward", "r", lambda r: r.reward, base=lambda r: r.reward
    ),
    comparison.Panel(
      "Change", "nats", lambda r: r.chosen, second=lambda r: r.rejected
    ),
  ]
  root = ET.fromstring(comparison.dot_plot(SOME, panels, "a title"))
  assert root.get("aria-label") == "a title"
  texts = [x.text for x in root.iter(f"{SVG}text")]
  assert {"start & <all>", "dpo", "none", "Reward", "Change"} <= set(texts)
  dots = list(root.iter(f"{SVG}circle"))
  assert len(dots) == 2 + 3 + 3  # one reward is unknown
  width, height = (float(root.get(k)) for k in ("width", "height"))
  for dot in dots:
    assert 0 < float(dot.get("cx")) < width
    assert 0 < float(dot.get("cy")) < height
  first, dpo = (d for d in dots[:2])
  assert float(dpo.get("cx")) > float(first.get("cx"))
  assert float(dpo.get("cy")) > float(first.get("cy"))


def test_far_values_do_not_crowd_the_near_ones():
  rows = [SOME[0]._replace(kl=k) for k in (0.0, 1.0, 2.0, -50.0, 90.0)]
  plots = {
    log: comparison.dot_plot(
      rows, [comparison.Panel("KL", "nats", lambda r: r.kl, log=log)], "t"
    )
    for log in (False, True)
  }
  at = {
    log: [float(d.get("cx")) for d in ET.fromstring(svg).iter(f"{SVG}circle")]
    for log, svg in plots.items()
  }
  for x in at.values():  # in order, whatever the scale
    assert x[3] < x[0] < x[1] < x[2] < x[4]
  assert at[True][2] - at[True][1] > 4 * (at[False][2] - at[False][1])
  labels = [x.text for x in ET.fromstring(plots[True]).iter(f"{SVG}text")]
  assert {"−100", "−1", "0", "3", "100"} <= set(labels)


def test_a_picture_of_one_value_everywhere_is_no_error():
  panel = comparison.Panel("KL", "nats", lambda r: 0.0)
  ET.fromstring(comparison.dot_plot(SOME[:1], [panel], "t"))
  nothing = comparison.Panel("KL", "nats", lambda r: math.nan)
  ET.fromstring(comparison.dot_plot(SOME[:1], [nothing], "t"))


def test_the_script_trains_judges_and_writes_once(
  tmp_path, monkeypatch, capsys
):
  """With a loop that only leaves a folder, and judges that know the result."""
  trained = []

  def train(config, workdir):
    trained.append((workdir.name, config.train.steps))
    return {"model_dir": str(workdir / "model")}

  def judged(config, models):
    assert models == {
      "ipo": str(tmp_path / "loss ipo" / "model"),
      "dpo": str(tmp_path / "loss dpo" / "model"),
    }
    return [SOME[0], SOME[2]._replace(name="ipo", reward=0.1), SOME[1]]

  # It would set up logging for all tests after this one.
  monkeypatch.setattr(
    "dpo_jax.main.guard", lambda **_: contextlib.nullcontext()
  )
  monkeypatch.setattr("dpo_jax.train.train", train)
  monkeypatch.setattr(compare_module, "compare", judged)
  monkeypatch.setattr(
    "sys.argv",
    ["x", f"--workdir={tmp_path}", "--losses=ipo,dpo", "--steps=3"],
  )
  runpy.run_path(str(ROOT / "scripts" / "compare_losses.py"))["main"]()
  assert trained == [("sft", 3), ("loss ipo", 3), ("loss dpo", 3)]
  table = (tmp_path / "table.md").read_text()
  assert table.strip() in capsys.readouterr().out
  names = [line.split(" | ")[0] for line in table.splitlines()[2:]]
  assert names == ["| SFT, the start", "| dpo", "| ipo"]  # by true reward
  assert (tmp_path / "table.csv").read_text().startswith("name,reward,")
  ET.fromstring((tmp_path / "picture.svg").read_text())
