"""Curves over a quantity that is no step, read back from the SVG."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from dpo_jax.report.curves import Curve, Plane, figure

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*curves, **options):
  plane = Plane("T & t", "pairs", "reward", curves, **options)
  return ET.fromstring(figure([plane], "a title"))


def dots(root):
  return [
    (float(d.get("cx")), float(d.get("cy"))) for d in root.iter(f"{SVG}circle")
  ]


def test_dots_lie_in_proportion_and_on_a_log_axis_by_ratio():
  curve = Curve("a", [1, 10, 100], [0.0, 1.0, 4.0], color=2)
  linear, log = dots(drawn(curve)), dots(drawn(curve, log=True))
  (a, b, c), (p, q, r) = ([x for x, _ in own] for own in (linear, log))
  assert (c - a) / (b - a) == pytest.approx(11, rel=0.01)
  assert r - q == pytest.approx(q - p, abs=0.2)
  heights = [y for _, y in linear]
  assert (heights[0] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(
    4, rel=0.01
  )


def test_a_band_reaches_from_error_to_error():
  root = drawn(Curve("a", [0, 1], [1.0, 2.0], [0.5, math.nan]))
  (band,) = (p for p in root.iter(f"{SVG}path") if p.get("class") == "b")
  points = [
    tuple(map(float, p))
    for p in re.findall(r"(-?[\d.]+) (-?[\d.]+)", band.get("d"))
  ]
  (x, y), (_, other) = dots(root)
  assert points[0][0] == points[3][0] == x
  assert (points[0][1] + points[3][1]) / 2 == pytest.approx(y, abs=0.1)
  assert points[3][1] - points[0][1] == pytest.approx(y - other, abs=0.2)
  assert points[1] == points[2]  # an error that nobody knows is none


def test_what_is_no_number_is_left_out_and_what_is_too_far_cut_off():
  curve = Curve("a", [0, 1, 2, math.nan, 50], [1.0, math.nan, 2.0, 3.0, 9.0])
  root = drawn(curve, most=10.0, range=(0.0, 4.0))
  inside = [d for d in dots(root) if d[0] < float(root.get("width"))]
  assert len(dots(root)) == 3 and len(inside) == 2
  (frame,) = (x for x in root.iter(f"{SVG}svg") if x is not root)
  left, top, width, height = map(float, frame.get("viewBox").split())
  for x, y in inside:
    assert left < x < left + width and top < y < top + height
  texts = [x.text for x in root.iter(f"{SVG}text")]
  assert "T & t" in texts and "a" in texts and "50" not in texts
  assert root.get("aria-label") == "a title"
  nothing = drawn(Curve("a", [math.nan], [1.0]))
  assert not dots(nothing)


def test_theory_is_dashed_and_has_no_dots():
  root = drawn(Curve("a", [0, 1], [0.0, 1.0], dashed=True))
  assert not dots(root)
  kinds = {p.get("class") for p in root.iter(f"{SVG}path")}
  assert "d" in kinds and "l" not in kinds
