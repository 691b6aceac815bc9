"""The page of a sweep: complete, escaped, and of one file."""

import base64
import html.parser
import json
import re

import pytest
from sweeps import sweep_of

from dpo_jax import sweep as grid
from dpo_jax.sweep.page import render_page
from dpo_jax.sweep.table import rows_of
from dpo_jax.sweep.write import write_tables

_VOID = {"meta", "img", "br"}


class Balanced(html.parser.HTMLParser):
  """Fails where a tag is closed that is not open."""

  def __init__(self):
    super().__init__()
    self.open, self.tags = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def parsed(page):
  parser = Balanced()
  parser.feed(page)
  assert parser.open == []
  return parser.tags


def finish(place, loss, reward=1.0):
  place.path.mkdir(parents=True)
  result = {"final_eval": {"loss": loss}, "true_reward": {"after": reward}}
  place.summary.write_text(json.dumps(result))
  (place.path / "report.html").write_text("")
  rows = [
    {"step": s, "split": "eval", "loss": loss + 1 / (s + 1), "kl": 0.1 * s}
    for s in (0, 5, 10)
  ]
  place.metrics.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def sweep(tmp_path):
  """Two runs that are done, one that has begun, one that has not."""
  betas = grid.listed("loss.beta", 0.1, 0.2, 0.3, 0.4)
  sweep = sweep_of(tmp_path / "a<b>", betas)
  first, second, third, _ = (sweep.place(run) for run in sweep.runs)
  finish(first, 0.5)
  finish(second, 0.25)
  third.path.mkdir(parents=True)
  third.log.write_text("error: <script>")
  third.metrics.write_text('{"step": 0, "split": "eval", "loss": "nan"}\n')
  return sweep


def test_all_runs_are_in_the_table_and_lead_to_their_reports(sweep):
  page = render_page(sweep, rows_of(sweep))
  links = [a["href"] for tag, a in parsed(page) if tag == "a"]
  assert len(links) == 3  # one has not begun and has nothing to show
  assert all(re.fullmatch(r"runs/beta%3D0\.\d-\w+/[a-z.]+", x) for x in links)
  assert [x.rpartition("/")[2] for x in links] == [
    "report.html",
    "report.html",
    "log.txt",
  ]
  assert page.count("<tr>") == 1 + 4
  assert "2 of 4 runs done" in page


def test_plots_are_across_runs(sweep):
  page = render_page(sweep, rows_of(sweep))
  charts = re.findall(r'<svg.*?aria-label="([^"]*)"', page)
  assert [c.partition(":")[0] for c in charts] == [
    "Held-out KL estimate",
    "Held-out loss",
  ]
  assert "0.1 0.591 at 10" in charts[1]
  assert "0.2 0.341 at 10" in charts[1]
  assert "--run0:hsl(" in page and "color:var(--run1)" in page
  (picture,) = (a["src"] for tag, a in parsed(page) if tag == "img")
  svg = base64.b64decode(picture.partition("base64,")[2]).decode()
  assert "Held-out loss" in svg and "True reward" in svg
  assert "<title>0.2: 0.250</title>" in svg
  assert "KL to reference" not in svg  # no run has one


def test_text_of_runs_is_escaped_and_nothing_is_fetched(tmp_path):
  evil = '"><script>alert(1)</script>'
  sweep = sweep_of(tmp_path, grid.listed("data.source", evil, "b"))
  finish(sweep.place(sweep.runs[0]), 0.5)
  page = render_page(sweep, rows_of(sweep))
  tags = parsed(page)
  assert "script" not in {tag for tag, _ in tags}
  assert "default-src 'none'" in page
  assert not re.search(r"(src|href)=.?(https?:)?//", page)


def test_a_sweep_that_has_not_begun_is_a_table_alone(tmp_path):
  sweep = sweep_of(tmp_path, grid.listed("seed", 1, 2))
  page = render_page(sweep, rows_of(sweep))
  assert "never started" in page
  assert "<svg" not in page and "<img" not in page
  parsed(page)


def test_the_page_lies_beside_the_tables(sweep):
  rows = rows_of(sweep)
  write_tables(sweep, rows)
  page = (sweep.root / "sweep.html").read_text()
  assert page == render_page(sweep, rows)
  assert "<b>" not in page.partition("<style>")[0]
