"""Charts are checked by parsing them and reading the coordinates back."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from dpo_jax.report import ticks
from dpo_jax.report.svg import Series, line_chart, spread_labels

NAN = math.nan


def curve(x, y, **kwargs):
  return Series("a", x, y, "train", **kwargs)


def chart(*series, **kwargs):
  return ET.fromstring(line_chart(series, "t", **kwargs))


def find(root, name):
  return [e for e in root.iter() if e.get("class") == name]


def strokes(root, style="line"):
  """Each curve's list of unbroken strokes, as points."""
  out = []
  for path in find(root, style):
    parts = path.get("d").split("M")[1:]
    pair = re.compile(r"(-?[\d.]+) (-?[\d.]+)")
    out.append([[tuple(map(float, p)) for p in pair.findall(q)] for q in parts])
  return out


def tick_heights(root):
  texts = find(root, "y")
  lines = find(root, "grid")
  return {
    float(text.text.replace("−", "-").replace(",", "")): float(
      re.match(r"M\S+ ([\d.]+)H", line.get("d"))[1]
    )
    for text, line in zip(texts, lines)
  }


def tick_places(root):
  return {
    float(text.text.replace(",", "")): float(text.get("x"))
    for text in find(root, "x")
  }


def test_a_line_meets_the_ticks_of_its_values():
  root = chart(curve([0, 40, 100], [0.0, 1.0, 0.25]))
  ((points,),) = strokes(root)
  x, y = tick_places(root), tick_heights(root)
  assert points[0] == pytest.approx((x[0], y[0.0]))
  assert points[1] == pytest.approx((x[40], y[1.0]))
  quarter = y[0.0] + 0.25 * (y[1.0] - y[0.0])
  assert points[2] == pytest.approx((x[100], quarter), abs=0.01)
  assert y[1.0] < y[0.0], "larger values are higher on the page"


def test_the_axis_ends_at_round_values_around_the_data():
  heights = tick_heights(chart(curve([1, 2, 3], [0.13, 0.69, 0.41])))
  assert list(heights) == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_a_nan_breaks_the_line_and_nothing_bridges_it():
  root = chart(curve(range(6), [1, 2, NAN, 3, math.inf, 4]))
  (line,) = strokes(root)
  assert [len(stroke) for stroke in line] == [2, 1, 1]
  assert find(root, "line")[0].get("d").count("h0") == 3


@pytest.mark.parametrize(
  ("x", "y"),
  [
    ([7], [0.5]),
    ([0], [0.0]),
    ([1, 2, 3], [0.6931472] * 3),
    ([1, 2], [0.0, 0.0]),
    ([1, 2], [1e-12, 3e-12]),
    ([1, 2], [-1e30, 1e30]),
    ([1, 2, 3], [NAN, 5.0, NAN]),
  ],
)
def test_single_constant_and_extreme_values_stay_inside_the_plot(x, y):
  root = chart(curve(x, y), size=(560, 290))
  for stroke in strokes(root)[0]:
    for px, py in stroke:
      assert 0 < px < 560
      assert 0 < py < 290
  assert len(find(root, "y")) >= 2


@pytest.mark.parametrize("y", [[], [NAN, NAN], [math.inf, NAN]])
def test_nothing_finite_is_no_chart(y):
  assert line_chart([curve(range(len(y)), y)], "t") == ""


def test_thousands_of_points_keep_their_spikes():
  y = [math.sin(i / 500) for i in range(20_000)]
  y[7_777], y[12_345], y[15_000] = 9.0, -9.0, NAN
  root = chart(curve(range(20_000), y), guides={-10: "", 10: ""})
  (line,) = strokes(root)
  points = [point for stroke in line for point in stroke]
  heights = tick_heights(root)
  at = heights[0.0] + 0.9 * (heights[10.0] - heights[0.0])
  assert len(points) < 2_000
  assert len(line) == 2, "the gap is still there"
  assert min(py for _, py in points) == pytest.approx(at, abs=0.01)
  xs = [px for px, _ in points]
  assert xs == sorted(xs)


def test_end_labels_show_the_last_finite_value_without_overlap():
  a = curve([1, 2, 3], [0, 1, 0.5], label="train")
  b = curve([1, 2, 3], [0, 0.501, NAN], label="eval")
  root = chart(a, b)
  labels = find(root, "end")
  assert [label.text for label in labels] == ["train 0.500", "eval 0.501"]
  first, second = (float(label.get("y")) for label in labels)
  assert abs(first - second) >= 12


def test_labels_pushed_below_the_plot_come_back_inside():
  placed = spread_labels([99, 98, 100], bottom=100)
  assert max(placed) <= 100
  order = sorted(placed)
  assert min(b - a for a, b in pairwise(order)) >= 12
  assert placed[1] < placed[0] < placed[2]


def test_tooltips_carry_step_name_and_value():
  root = chart(
    Series("train", [1, 2], [0.5, 0.25], "train"),
    Series("eval", [2], [0.125], "eval", "dots"),
  )
  titles = [e.text for e in root.iter() if e.tag.endswith("title")]
  assert "step 2\ntrain: 0.250\neval: 0.125" in titles
  assert "eval 0.125 at 2" in titles


def test_many_points_share_a_bounded_number_of_tooltips():
  root = chart(curve(range(5_000), [1.0] * 5_000))
  titles = [e for e in root.iter() if e.tag.endswith("title")]
  assert len(titles) <= 100


def test_names_are_escaped():
  hostile = '<script>"&'
  series = [Series(hostile, [1], [1], "train", label=hostile)] * 2
  text = line_chart(series, hostile, hostile, {1: hostile})
  assert "<script" not in text
  ET.fromstring(text)


def test_guides_are_drawn_and_the_axis_takes_them_in():
  line = curve([1, 2], [0.5, 1.3])
  root = chart(line, guides={0.0: "", 1.0: "full"})
  assert len(find(root, "guide")) == 2
  assert "full" in [label.text for label in find(root, "guide-label")]
  heights = tick_heights(root)
  assert (min(heights), max(heights)) == (0.0, 1.5)


@pytest.mark.parametrize(
  ("low", "high", "expected"),
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (-3, 2, [-3, -2, -1, 0, 1, 2]),
    (0, 126, [0, 50, 100]),
    (0, 5e-7, [0, 1e-7, 2e-7, 3e-7, 4e-7, 5e-7]),
  ],
)
def test_ticks_are_round_numbers(low, high, expected):
  step = ticks.round_step(low, high, 4 if high == 126 else 5)
  assert ticks.ticks(low, high, step) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
    ([0.0, 1e-7, 2e-7], ["0", "1e−7", "2e−7"]),
    ([-2000.0, -1000.0, 0.0], ["−2,000", "−1,000", "0"]),
    ([0.6931, 0.6932], ["0.6931", "0.6932"]),
  ],
)
def test_ticks_of_an_axis_are_written_alike(values, expected):
  assert ticks.format_ticks(values) == expected


def test_values_are_written_with_about_three_digits():
  values = [0.0, 0.69315, 2.345, -149.61, 12345.6, 5e-7, NAN, -math.inf]
  assert [ticks.format_value(v) for v in values] == [
    *("0", "0.693", "2.35", "−149.6", "12,346", "5e−7", "nan", "−inf")
  ]


def test_an_estimate_is_written_to_two_digits_of_its_error():
  pairs = [(6.2227, 0.996), (14.27, 0.0213), (-3.0, 25.0), (2.5, None), (0, 0)]
  assert [ticks.format_estimate(*pair) for pair in pairs] == [
    *("6.22 ± 1.00", "14.270 ± 0.021", "−3 ± 25", "2.50", "0")
  ]


def test_smoothing_leaves_gaps_and_ignores_them():
  y = ticks.smooth([1, 2, NAN, 4, 5], 3)
  assert y[:2] == [1.5, 1.5]
  assert math.isnan(y[2])
  assert y[3:] == [4.5, 4.5]


def test_smoothing_many_values_stays_fast():
  n = 50_000
  y = ticks.smooth([float(i) for i in range(n)], 5001)
  assert len(y) == n
  assert y[-1] == pytest.approx(n - 1 - 1250)
  assert y[n // 2] == n // 2


def test_decimation_keeps_the_ends_spikes_and_gaps():
  y = [0.0] * 10_000
  y[3], y[5_001], y[7_000] = 9.0, -9.0, NAN
  kept = ticks.decimate(y, 100)
  assert len(kept) < 210
  assert {0, 3, 5_001, 7_000, 9_999} <= set(kept)
  assert ticks.decimate(y[:50], 100) == list(range(50))
