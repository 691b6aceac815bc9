"""The comparison of methods: its quick form as a whole, and its parts."""

import contextlib
import csv
import itertools
import json
import math
import pathlib
import runpy
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "scripts"))
from methods.forms import FULL, QUICK, Form, Job, chain
from methods.peak import peak_memory
from methods.results import TITLES, reward_at
from methods.runs import Runs
from runs import compile_once  # noqa: F401

from configs.compare_methods import METHODS, TOKENS
from dpo_jax.best_of_n import analytic_kl, pick
from dpo_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def run_script(folder):
  """The quick form; logging is left as the tests have it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("dpo_jax.main.guard", lambda **_: contextlib.nullcontext())
    patch.setattr("sys.argv", ["x", "--quick", f"--workdir={folder}"])
    runpy.run_path(str(ROOT / "scripts" / "compare_methods.py"))["main"]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compile_quickly):
  path = tmp_path_factory.mktemp("methods")
  run_script(path)
  return path


def rows_of(path):
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_quick_form_makes_every_part_of_the_output(folder):
  names = {row["name"] for row in rows_of(folder / "table.csv")}
  assert names == set(TITLES.values())
  table = (folder / "table.md").read_text().splitlines()
  assert len(table) == 2 + len(TITLES) and TITLES["start"] in table[2]
  for name in ("frontier", "pairs", "beta"):
    root = ET.parse(folder / f"{name}.svg").getroot()
    texts = {x.text for x in root.iter(f"{SVG}text")}
    assert TITLES["dpo"] in texts
    width, height = (float(root.get(k)) for k in ("width", "height"))
    dots = list(root.iter(f"{SVG}circle"))
    assert len(dots) >= 4
    for dot in dots:
      assert 0 < float(dot.get("cx")) < width
      assert 0 < float(dot.get("cy")) < height


@pytest.mark.slow
def test_all_methods_have_the_same_budget(folder):
  rows = rows_of(folder / "table.csv")
  spent = {r["name"]: int(r["responses"]) for r in rows}
  assert spent.pop(TITLES["start"]) == 0
  assert set(spent.values()) == {QUICK.budget}
  # What the runs themselves say of their steps: 32 pairs; 64 answers; 16
  # prompts with 4 answers; 32 answers in two models.
  runs = {
    "dpo": (4, 2), "chosen": (4, 1), "kto": (4, 1), "reward": (2, 2),
    "ppo": (2, 2), "ppo_true": (4, 2), "grpo": (2, 4),
  }  # fmt: skip
  for method, (steps, count) in runs.items():
    dial = METHODS.get(method, (0,))[0] or 0
    name = Job(method, dial, 0, QUICK.pairs).name
    summary = json.loads((folder / name / "summary.json").read_text())
    assert summary["steps"] == steps
    stage = summary["steps"] * summary["batch_size"] * count
    whole = len(chain(Job(method, dial, 0, 1))) == 1 and method != "reward"
    assert stage == QUICK.budget // (1 if whole else 2)


@pytest.mark.slow
def test_the_tables_have_the_numbers_that_were_judged(folder):
  judged = json.loads((folder / "judged.json").read_text())
  table = {row["name"]: row for row in rows_of(folder / "table.csv")}
  for method, (dial, *_) in METHODS.items():
    row = table[TITLES[method]]
    job = Job(method, dial or 0, 0, QUICK.pairs)
    own = judged["rows"][job.name]
    assert float(row["reward"]) == own["reward"]
    assert float(row["kl"]) == own["kl"]
    trained = [judged["trained"][j.name] for j in chain(job)]
    assert int(row["settings"]) == sum(len(t["settings"]) for t in trained)
    assert float(row["seconds"]) == pytest.approx(
      sum(t["wall_seconds"] for t in trained)
    )
    assert int(row["stages"]) == 1 + len(trained)
  best = judged["best_of_n"]["0"]
  assert [b["n"] for b in best] == list(QUICK.counts)
  for b in best:
    assert b["analytic_kl"] == analytic_kl(b["n"])
    assert -1e-9 <= b["kl"] <= b["analytic_kl"] + 1e-9
  points = rows_of(folder / "points.csv")
  assert [p["dial"] for p in points if p["method"] == "dpo"] == [
    "0.1", "0.3", "0.3",
  ]  # fmt: skip
  for p in points:
    if p["method"] == "best_of_n":
      own = next(b for b in best if b["n"] == int(p["dial"]))
    else:
      job = Job(p["method"], float(p["dial"]), 0, int(p["pairs"]))
      own = judged["rows"][job.name]
      assert float(p["accuracy"]) == own["accuracy"]
    assert float(p["reward"]) == own["reward"] and float(p["kl"]) == own["kl"]


@pytest.mark.slow
def test_what_is_done_is_not_done_again(folder, monkeypatch):
  def never(*_):
    raise AssertionError("trained or judged again")

  for name in ("train", "compare", "best_of_n"):
    monkeypatch.setattr(f"methods.runs.{name}", never)
  before = (folder / "table.csv").read_text()
  run_script(folder)
  assert (folder / "table.csv").read_text() == before
  with pytest.raises(ConfigError, match="another form"):
    Runs(folder, Form())


def test_the_best_of_n_is_that_of_all_draws():
  rng = np.random.default_rng(0)
  scores = np.array([0.3, -1.0, 0.3, 2.0, 0.1])  # two alike
  rewards = rng.normal(size=5)
  n, chance, worth = 3, np.zeros(5), []
  for drawn in itertools.product(range(5), repeat=n):
    best = max(scores[list(drawn)])
    at = [i for i in drawn if scores[i] == best]
    worth.append(np.mean(rewards[at]))
    for i in at:
      chance[i] += 1 / len(at) / 5**n
  reward, kl = pick(scores, rewards, n)
  assert reward == pytest.approx(np.mean(worth))
  assert kl == pytest.approx(np.sum(chance * np.log(chance * 5)))


def test_the_kl_of_the_best_of_n_is_the_formula_where_scores_differ():
  scores = np.random.default_rng(0).normal(size=20000)
  for n in (1, 2, 4, 16, 64):
    _, kl = pick(scores, scores, n)
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=2e-3)
  assert pick(np.zeros(9), np.arange(9.0), 4) == (pytest.approx(4.0), 0.0)


def test_the_peak_is_what_a_block_took_and_gave_back():
  with peak_memory() as peak:
    del_me = np.ones(2**25, np.uint8)  # 32 MiB
    del del_me
  if not math.isnan(peak.rise):
    assert 30 * 2**20 < peak.rise < 64 * 2**20
  with peak_memory() as peak:
    pass
  assert math.isnan(peak.rise) or peak.rise < 16 * 2**20


def test_reward_at_a_kl_lies_on_the_line_and_not_beyond_the_farthest():
  points = [(0.0, 0.0), (3.0, 1.5), (1.0, 1.0)]
  assert reward_at(points, 2.0) == pytest.approx(1.25)
  assert math.isnan(reward_at(points, 3.1))


def test_every_run_comes_after_those_that_it_needs():
  for form in (QUICK, Form(), FULL):
    jobs = list(form.jobs())
    assert len(jobs) == len({job.name for job in jobs})
    for i, job in enumerate(jobs):
      assert set(chain(job)) <= set(jobs[: i + 1])
  assert FULL.seeds == 5 and max(FULL.sizes) == 20000 and min(FULL.sizes) == 300
  for form in (Form(), FULL):
    assert (min(form.dials), max(form.dials)) == (0.01, 5.0)
  assert len(" big old raw.") + 1 == TOKENS
