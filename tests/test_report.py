"""The page says what the numbers say, and hostile text stays text."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from dpo_jax.errors import DataError
from dpo_jax.metrics import CLOCKED
from dpo_jax.report import write_report
from dpo_jax.report.page import MAX_SAMPLES
from dpo_jax.report.reasons import REASONS
from dpo_jax.writers import MetricsWriter

BEFORE = {
  "loss": 0.6931,
  "rewards/accuracies": 0.5,
  "rewards/margins": 0.0,
  "logps/chosen": -140.0,
  "logps/rejected": -150.0,
  "rewards/chosen": 0.0,
  "rewards/rejected": 0.0,
}
AFTER = {
  "loss": 0.412,
  "rewards/accuracies": 0.8125,
  "rewards/margins": 1.25,
  "logps/chosen": -152.0,
  "logps/rejected": -180.0,
  "rewards/chosen": -1.25,
  "rewards/rejected": -2.5,
}
DISPLACEMENT = "likelihood displacement"


class Page(HTMLParser):
  """Collects the tags and text, and notes tags left open."""

  VOID = ("meta", "br")

  def __init__(self, html):
    super().__init__()
    self.tags, self.open, self.text = [], [], ""
    self.feed(html)
    self.text = re.sub(r"\s+", " ", self.text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("style", "title"):
      self.text += data


def write_metrics(directory, steps=30, split="train", **at_end):
  with MetricsWriter(directory) as writer:
    for step in range(1, steps + 1):
      values = {
        key: a + (at_end.get(key, AFTER[key]) - a) * step / steps
        for key, a in BEFORE.items()
      }
      writer.write(step, split, values)


def write_evals(directory, before, after):
  with MetricsWriter(directory) as writer:
    writer.write(0, "eval", before)
    writer.write(30, "eval", after)


def page(directory, summary=None, samples=None):
  if summary is not None:
    (directory / "summary.json").write_text(json.dumps(summary))
  if samples is not None:
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (directory / "samples.jsonl").write_text(lines)
  path = write_report(directory)
  assert path == directory / "report.html"
  assert not list(directory.glob("*.part"))
  parsed = Page(path.read_text(encoding="utf-8"))
  assert parsed.open == []
  return parsed


def test_the_headline_says_what_changed_in_words_and_numbers(tmp_path):
  write_evals(tmp_path, BEFORE, AFTER)
  text = page(
    tmp_path,
    {
      "method": "dpo",
      "model": "tiny",
      "eval_examples": 2000,
      "true_reward": {"before": 0.1, "after": 0.75},
      "kl_to_reference": 14.27,
      "kl_standard_error": 0.35,
    },
  ).text
  assert "DPO: tiny" in text
  assert "On 2,000 held-out examples, loss fell from 0.693 to 0.412" in text
  assert "accuracy rose from 0.500 to 0.812" in text
  assert "margin rose from 0 to 1.25" in text
  assert "true reward of sampled responses rose from 0.100 to 0.750" in text
  assert "14.27 ± 0.35 nats per response" in text


def test_a_worse_number_is_called_worse(tmp_path):
  write_evals(tmp_path, {"loss": 0.4}, {"loss": 0.6})
  text = page(tmp_path).text
  assert "loss rose from 0.400 to 0.600" in text
  assert "+0.200, worse" in text
  assert "better" not in text.split("Curves")[0]


def test_displacement_is_explained_when_chosen_fell_and_accuracy_rose(
  tmp_path,
):
  write_evals(tmp_path, BEFORE, AFTER)
  text = page(tmp_path).text
  assert DISPLACEMENT in text
  assert "chosen fell from −140.0 to −152.0" in text
  assert "SFT term" in text


@pytest.mark.parametrize(
  "change",
  [
    {"logps/chosen": -130.0},
    {"logps/chosen": -140.0},
    {"rewards/accuracies": 0.4},
    {"rewards/accuracies": 0.5},
    {"logps/chosen": math.nan},
  ],
)
def test_displacement_is_not_mentioned_otherwise(tmp_path, change):
  write_evals(tmp_path, BEFORE, AFTER | change)
  assert DISPLACEMENT not in page(tmp_path).text


@pytest.mark.parametrize(
  ("split", "change"),
  [("eval", "0.684 to 0.412"), ("train", "0.674 to 0.421")],
)
def test_without_evaluations_the_training_rows_tell_the_change(
  tmp_path, split, change
):
  write_metrics(tmp_path, split=split)
  text = page(tmp_path).text
  assert DISPLACEMENT in text
  measure = "log-probability" if split == "eval" else "reward"
  assert f"The chosen {measure} fell" in text
  assert f"loss fell from {change}" in text
  assert ("No held-out evaluation" in text) == (split == "train")


def test_over_optimisation_and_late_overfitting_are_pointed_out(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step, loss in ((0, 0.69), (10, 0.4), (20, 0.55)):
      values = {"loss": loss, "rewards/accuracies": 0.5 + step / 100}
      writer.write(step, "eval", values)
  summary = {"true_reward": {"before": 0.5, "after": 0.2}}
  text = page(tmp_path, summary).text
  assert "Accuracy rose but the true reward fell" in text
  assert "lowest at step 10" in text


def test_an_online_run_shows_its_reward_beside_its_price(tmp_path):
  before = {"objective/scores": -0.25, "objective/kl": 0.0}
  after = {"objective/scores": 1.75, "objective/kl": 43.0, "kl": 1.1}
  write_evals(tmp_path, before, after)
  summary = {"method": "grpo", "true_reward": {"before": 0.1, "after": -0.4}}
  text = page(tmp_path, summary).text
  assert "reward of answers rose from −0.250 to 1.75" in text
  assert "The reward rose but the true reward fell" in text
  charts = re.findall(
    'aria-label="(.*?)"', (tmp_path / "report.html").read_text()
  )
  titles = " ".join(charts)
  assert "Reward of answers" in titles and "KL to the reference" in titles
  summary["true_reward"]["after"] = 0.4
  assert "true reward fell" not in page(tmp_path, summary).text


def test_a_nan_step_is_reported_with_its_number(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in range(1, 9):
      writer.write(step, "train", {"loss": math.nan if step == 5 else 1.0})
  text = page(tmp_path, {"skipped_steps": 1}).text
  assert "1 step skipped" in text
  assert "(step 5)" in text
  assert "nan" not in text.split("Curves")[0]


def test_every_plot_is_there_with_both_sides_in_one(tmp_path):
  sides = ("chosen", "rejected")
  with MetricsWriter(tmp_path) as writer:
    for step in range(1, 50):
      values = {f"rewards/{side}": step / 50 for side in sides}
      values |= {f"logps/{side}": -step for side in sides}
      values |= BEFORE | {"grad_norm": 1 / step, "learning_rate": 5e-7}
      writer.write(step, "train", values | {"entropy": 2.0})
  parsed = page(tmp_path)
  assert parsed.tags.count("svg") == 5 + 2 + 1
  html = (tmp_path / "report.html").read_text()
  charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
  both = [c for c in charts if ">chosen " in c and ">rejected " in c]
  assert len(both) == 2
  (accuracy,) = [c for c in charts if 'aria-label="Accuracy' in c]
  assert ">1.0</text>" in accuracy
  assert 'class="guide"' in accuracy


def test_hostile_text_stays_text_everywhere(tmp_path):
  evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
  with MetricsWriter(tmp_path) as writer:
    for step in (1, 2):
      writer.write(step, "train", {evil: step, "loss": 1.0})
  summary = {
    **dict.fromkeys(("method", "model", "device", "command"), evil),
    "dataset": {
      "source": evil,
      "format": evil,
      "rows": evil,
      "dropped": {evil: 3},
      "changed": {evil: 4},
    },
    "config": {evil: evil, "list": [evil]},
    "versions": {evil: evil},
    "throughput": {evil: evil},
  }
  sample = {"step": 1, "prompt": evil, "before": evil, "after": evil}
  parsed = page(tmp_path, summary, [sample])
  assert "script" not in parsed.tags
  assert "img" not in parsed.tags
  assert parsed.text.count(evil) > 10


def test_the_page_asks_for_nothing_from_the_network(tmp_path):
  write_metrics(tmp_path)
  page(tmp_path, {"model": "tiny"})
  html = (tmp_path / "report.html").read_text()
  html = html.replace("http://www.w3.org/2000/svg", "")
  assert not re.search(r"https?://|url\(|@import|<link|src=", html)
  assert "default-src 'none'" in html


def test_control_characters_and_lone_surrogates_are_shown_not_obeyed(tmp_path):
  write_metrics(tmp_path)
  after = "\x00 nul \u202e back \ud800 half\r\nline"
  text = page(tmp_path, {}, [{"prompt": "p", "before": None, "after": after}])
  assert "[U+0000] nul [U+202E] back ? half line" in text.text
  assert "(empty)" in text.text


def test_the_first_twenty_samples_are_shown_with_their_rewards(tmp_path):
  write_metrics(tmp_path)
  samples = [
    {
      "step": step,
      "prompt": f"prompt {step}.",
      "before": "a",
      "after": "b",
      "reward_before": -0.25,
      "reward_after": None,
    }
    for step in range(30)
  ]
  text = page(tmp_path, {}, samples).text
  assert text.count("prompt ") == MAX_SAMPLES
  assert "prompt 19." in text
  assert "prompt 20." not in text
  assert "first 20 of 30" in text
  assert "Before, reward −0.250" in text


def test_each_reason_for_dropping_or_changing_data_is_explained(tmp_path):
  write_metrics(tmp_path)
  reasons = list(REASONS)
  counts = {reason: 1000 + i for i, reason in enumerate(reasons)}
  dataset = {"source": "a.jsonl", "rows": 9000, "dropped": counts}
  dataset["changed"] = {"new_reason": 7, "prompt_cut": 0}
  text = page(tmp_path, {"dataset": dataset}).text
  for i, reason in enumerate(reasons):
    assert f"{1000 + i:,}{reason}{REASONS[reason]}" in text
  assert "7new_reason" in text


def test_clean_data_is_said_to_be_clean(tmp_path):
  write_metrics(tmp_path)
  dataset = {"source": "a.jsonl", "dropped": {"empty_prompt": 0}}
  text = page(tmp_path, {"dataset": dataset, "eval_examples": 200}).text
  assert "No row was dropped or changed" in text
  assert "Held out200 of these" in text


def test_settings_and_packing_are_told(tmp_path):
  write_metrics(tmp_path)
  summary = {"loss": {"beta": 0.1, "average": True}, "parameters": 587_008}
  summary |= {"steps": 1200, "batch_size": 64, "wall_seconds": 136.5}
  text = page(tmp_path, summary | {"row_tokens": 4096, "fill": 0.7691}).text
  assert "beta 0.1 · average true · 587,008 parameters" in text
  assert "1,200 steps of 64 examples · 2 min 16 s" in text
  assert "up to 4,096 tokens each, 76.9% filled" in text


def test_later_rows_of_a_step_replace_earlier_ones(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for loss in (9.0, 0.5):
      writer.write(4, "train", {"loss": loss})
  page(tmp_path)
  assert 'aria-label="Loss: train 0.500 at 4"' in (
    (tmp_path / "report.html").read_text()
  )


def test_an_empty_run_still_gives_a_page(tmp_path):
  MetricsWriter(tmp_path).close()
  assert "no metrics to compare" in page(tmp_path).text


def test_null_fields_are_left_out(tmp_path):
  write_metrics(tmp_path)
  keys = ("method", "dataset", "steps", "initial_eval", "true_reward", "config")
  keys += ("kl_to_reference", "throughput", "versions", "skipped_steps")
  text = page(tmp_path, dict.fromkeys(keys)).text
  assert "None" not in text


def test_the_machine_is_told_of_in_a_table_and_not_in_charts(tmp_path):
  clocked = dict.fromkeys(CLOCKED, 0.5)
  with MetricsWriter(tmp_path) as writer:
    for step in (2, 4):
      writer.write(step, "train", {"loss": 1.0} | clocked)
  text = page(tmp_path).text
  assert "Throughput" in text
  assert "Other metrics" not in text
  for name in CLOCKED:
    assert name not in text
  throughput = {
    "pairs_per_second": 12.3456,
    "tokens_per_second": 12345.6,
    "mfu": 0.4123,
    "data_wait": 0.0625,
    "goodput": 0.981,
    "rollout_seconds": 2.468,
    "update_seconds": 13.57,
    "peak_memory_bytes": 3 * 2**29,
  }
  assert throughput.keys() == CLOCKED
  text = page(tmp_path, {"throughput": throughput}).text
  for value in (
    "12.35",
    "12,346",
    "41.2%",
    "6.2%",
    "98.1%",
    "2.47",
    "13.6",
    "1.50 GiB",
  ):
    assert value in text, value
  for name in CLOCKED:
    assert name not in text


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(DataError, match=r"metrics\.jsonl: no such"):
    write_report(tmp_path)
  write_metrics(tmp_path)
  (tmp_path / "samples.jsonl").write_text('{"prompt": "p"}\n{"pro')
  with pytest.raises(DataError, match=r"samples\.jsonl: not readable"):
    write_report(tmp_path)
  (tmp_path / "summary.json").write_text("{")
  with pytest.raises(DataError, match=r"summary\.json: not readable"):
    write_report(tmp_path)
