"""The benchmark measures one computation, counts right, and runs as a whole."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "scripts"))
from benchmarks import device_set, lengths, planned, render, trace, work
from benchmarks.plan import plan
from benchmarks.problem import Problem

from dpo_jax import flops

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {
  "pairs": 2, "batches": 2, "width": 32, "layers": 2, "heads": 4, "ffn": 64,
  "vocab": 256,
}  # fmt: skip
LENGTHS = ((5, 3, 7), (9, 2, 2), (4, 4, 1), (6, 8, 5))
RAGGED = Problem(**TINY, distribution="some", lengths=LENGTHS)


def scored(tokens, begin, end):
  return tokens[begin:end].tolist()


def test_packed_and_padded_batches_hold_the_same_responses():
  planned = plan(RAGGED)
  for i, (tokens, prompts, ends) in enumerate(RAGGED.padded()):
    batch = planned[i].batch
    n = RAGGED.pairs
    assert tokens.shape == (2 * n, ends.max())
    for pair in range(n):
      row, place = np.argwhere(planned[i].ids == i * n + pair)[0]
      for branch in (0, 1):
        at = branch * n + pair
        # A rejected branch lies backwards.
        of_row = batch.target[row][batch.slot[row] == 2 * place + branch]
        expected = scored(tokens[at], prompts[at], ends[at])
        assert sorted(of_row.tolist()) == sorted(expected)
        assert prompts[at] == LENGTHS[i * n + pair][0]


def test_drawn_tokens_are_never_what_pads_and_lengths_are_as_given():
  batches = RAGGED.draw()
  found = [tuple(map(len, pair)) for batch in batches for pair in batch]
  assert tuple(found) == LENGTHS
  assert min(x.min() for b in batches for pair in b for x in pair) > 0


def test_lengths_that_are_not_those_of_all_pairs_are_refused():
  with pytest.raises(ValueError, match="3 pairs, for 2 batches of 2"):
    Problem(**TINY, lengths=LENGTHS[:3])


@pytest.mark.parametrize("name", ["hh-like", "tldr-like", "ultrafeedback-like"])
def test_generated_lengths_are_cut_and_repeat(name):
  drawn = lengths.draw(name, 64, longest=300, seed=1)
  assert drawn == lengths.draw(name, 64, longest=300, seed=1)
  assert drawn != lengths.draw(name, 64, longest=300, seed=2)
  x = np.array(drawn)
  assert x.shape == (64, 3) and x.min() >= 1
  assert (x[:, :1] + x[:, 1:]).max() <= 300 and x[:, 0].max() <= 150


def test_a_full_step_needs_four_forwards_and_one_with_adapters_about_three():
  config = RAGGED.model_config()
  x = np.array(LENGTHS)
  of_all = flops.work(config, x[:, 0], x[:, 1:])
  forward = flops.Costs(config, {}).forward(of_all) / RAGGED.batches
  assert work.needed(RAGGED) == pytest.approx(4 * forward)
  assert work.needed(RAGGED, reference=False) == pytest.approx(3 * forward)
  adapted = Problem(**TINY, lora=1, lengths=LENGTHS)
  assert 2.5 * forward < work.needed(adapted) < 3.5 * forward


def test_the_concatenated_step_pays_for_padding_prompts_and_all_keys():
  # Longest: 12 tokens in the first batch, 14 in the second.
  d, f, v, layers = 32, 64, 256, 2
  total = 0
  for t in (12, 14):
    of_token = layers * (4 * d * d + 3 * d * f) + v * d
    total += 4 * (2 * 4 * of_token * t + 4 * 4 * d * t * t * layers)
  assert work.concatenated(RAGGED) == pytest.approx(total / 2)


def test_an_op_is_charged_what_no_op_within_it_takes():
  events = [(0, 100, "while.3"), (10, 30, "dot.1"), (40, 20, "dot.12"),
            (45, 5, "copy"), (100, 7, "gemm_128")]  # fmt: skip
  found = trace.self_times(events)
  assert found == {"while": 50, "dot": 45, "copy": 5, "gemm": 7}
  assert trace.kind("dot") == trace.kind("ampere_sgemm") == "matrix product"
  assert trace.kind("dkv_kernel") == "attention kernel"
  assert trace.kind("loop_add_fusion") == "other"


def test_results_of_another_machine_are_not_mixed(tmp_path):
  path = tmp_path / "results.json"
  for _ in range(2):
    render.Results(str(path)).add(RAGGED, [{"variant": "ours"}], device="cpu")
  content = json.loads(path.read_text())
  assert len(content["runs"]) == 2
  content["machine"]["cpu"] = "another"
  path.write_text(json.dumps(content))
  with pytest.raises(SystemExit, match="measured on"):
    render.Results(str(path))


def test_rows_that_begin_apart_are_doubted():
  rows = [
    {"variant": name, "losses": [0.6931], "logps": [logps]}
    for name, logps in (("ours", -100.0), ("trl", -101.0))
  ]
  assert not device_set.comparable(RAGGED, [*rows, {"error": "gone"}])
  rows[1]["logps"] = [-110.0]
  assert "logps begin with -100.0" in device_set.comparable(RAGGED, rows)


def run(tmp_path, *arguments):
  path = tmp_path / "out.json"
  found = subprocess.run(
    [
      sys.executable, str(ROOT / "scripts" / "benchmark.py"),
      f"--json={path}", "--rounds=1", "--variants=ours,concat", *arguments,
    ],
    capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=False,
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  (one,) = json.loads(path.read_text())["runs"]
  return found.stdout, one


@pytest.mark.slow
def test_variants_in_turns_have_the_same_losses_on_ragged_batches(tmp_path):
  sizes = [f"--{name}={value}" for name, value in TINY.items()]
  text, one = run(tmp_path, *sizes, "--lengths=hh-like", "--longest=128")
  ours, concat = one["rows"]
  assert "| concat |" in text and one["problem"]["distribution"] == "hh-like"
  assert ours["losses"] == pytest.approx(concat["losses"], abs=1e-4)
  assert len(set(ours["losses"])) == 3  # it trains
  assert ours["temp_mb"] > 0 and ours["cpu_seconds"] > 0


def test_the_set_for_accelerators_runs_on_a_cpu(tmp_path):
  text, one = run(
    tmp_path, "--device=cpu", "--models=tiny", "--lengths=fixed",
    "--peak-tflops=0.001", f"--trace={tmp_path / 'trace'}",
  )  # fmt: skip
  ours, concat = one["rows"]
  assert one["problem"]["dtype"] == "bfloat16" and not one["doubt"]
  of_peak = work.needed(Problem(**_fields(one))) / ours["wall_seconds"] / 1e9
  assert ours["mfu"] == pytest.approx(of_peak)
  assert ours["planned_mb"] > 0 and ours["device_peak_mb"] is None
  assert ours["logps"][0] == pytest.approx(concat["logps"][0], rel=0.02)
  assert sum(ours["trace"]["kinds"].values()) > 0
  assert "Milliseconds of one step of ours" in text


def _fields(run):
  return {k: v for k, v in run["problem"].items() if k != "name"}


def test_what_a_step_holds_is_told_without_running_it(monkeypatch, capsys):
  monkeypatch.setattr(planned.topology, "devices", lambda name: jax.devices())
  monkeypatch.setattr(
    sys, "argv",
    ["planned.py", "--topology=any", "--models=tiny-lora", "--remat=minimal"],
  )  # fmt: skip
  planned.main()
  *_, head, _, row = capsys.readouterr().out.splitlines()
  assert head == "| model | lengths | tokens | given | minimal |"
  assert row.startswith("| tiny-lora | fixed | 80 | 0.0 | ")
