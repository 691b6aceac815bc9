"""The examples for other projects: each runs alone, and learns."""

import importlib.util
import math
import pathlib

import jax.numpy as jnp
import pytest

from dpo_jax import losses
from dpo_jax.losses import registry

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "examples"


@pytest.fixture
def load(monkeypatch):
  """Imports an example by path; the registry forgets what it adds."""
  monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

  def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  return load


def check_learns(result):
  assert result.keys() == {
    f"{when}_{what}"
    for when in ("initial", "final")
    for what in ("loss", "accuracy")
  }
  assert result["final_loss"] < result["initial_loss"] - 0.1
  assert result["final_accuracy"] > result["initial_accuracy"] + 0.2


@pytest.mark.parametrize("name", ["with_optax", "with_nnx", "with_equinox"])
def test_an_example_starts_at_log_2_and_learns(load, name, capsys):
  if name == "with_equinox":
    pytest.importorskip("equinox", reason="the example of equinox needs it")
  example = load(name)
  result = example.main(steps=20)
  assert result["initial_loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert result["initial_accuracy"] == pytest.approx(0.5, abs=0.1)
  check_learns(result)
  # The first line is the one that its docstring shows; no training in it.
  first = capsys.readouterr().out.splitlines()[0]
  assert first == "initial: loss 0.693, accuracy 0.500"
  assert first in example.__doc__


@pytest.mark.parametrize("name", ["with_optax", "with_nnx", "with_equinox"])
def test_an_example_scores_the_response_and_nothing_else(load, name):
  if name == "with_equinox":
    pytest.importorskip("equinox", reason="the example of equinox needs it")
  example = load(name)
  tokens = jnp.array([[3, 1, 2, 0, 0], [3, 1, 2, 2, 1]])
  mask = jnp.array([[0, 0, 1, 0, 0], [0, 0, 1, 1, 1]], bool)
  # After token t comes t + 1 with p = 1/2, and each other token with 1/6.
  table = jnp.full((4, 4), 1 / 6).at[jnp.arange(3), jnp.arange(1, 4)].set(0.5)
  model = lambda tokens: jnp.log(table)[tokens]
  if name == "with_optax":  # takes parameters where the others take a model
    example.logits = lambda params, tokens: params(tokens)
  got = example.response_logps(model, tokens, mask)
  # 1 -> 2 is likely; 2 -> 2 and 2 -> 1 are not; prompt and padding count not.
  want = jnp.log(jnp.array([1 / 2, 1 / 2 / 6 / 6]))
  assert jnp.allclose(got, want, rtol=1e-6)


def test_the_loss_of_ones_own_trains_in_a_mixture(load):
  example = load("own_loss")
  result = example.main(steps=20)
  at_start = math.log(2) / 2 + 0.1 * math.log(example.ANSWERS)
  assert result["initial_loss"] == pytest.approx(at_start, rel=1e-6)
  assert result["initial_accuracy"] == 0.5
  check_learns(result)


def test_the_loss_of_ones_own_is_dpo_at_gamma_0(load):
  load("own_loss")
  logps = [jnp.array([x, -1.0]) for x in (-1.0, -2.5, -1.5, -0.5)]
  ours = losses.make("focal", gamma=0.0)(*logps)
  assert jnp.allclose(ours.loss, losses.dpo(*logps).loss, rtol=1e-6)


def test_the_example_with_state_learns(load):
  result = load("own_loss").with_state(steps=20)
  assert result["initial_loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert result["final_loss"] < result["initial_loss"] - 0.1


def test_every_example_says_how_to_run_it():
  examples = sorted(EXAMPLES.glob("*.py"))
  assert len(examples) >= 4
  for path in examples:
    head = path.read_text().split('"""')[1]
    assert f"python docs/examples/{path.name}\n" in head
