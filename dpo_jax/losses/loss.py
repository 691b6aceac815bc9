"""A loss with its hyper-parameters fixed: one method, or a mixture of several,
and the modifiers that go with any of them. `making.py` makes them."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax

from dpo_jax.losses import registry
from dpo_jax.losses.base import INPUTS, LossOutput, Weighted
from dpo_jax.losses.modifiers import (
  SIDES,
  logps_of_a_pair,
  run_modified,
  tail_of,
)
from dpo_jax.losses.registry import MODIFIERS


@dataclasses.dataclass(frozen=True)
class Term:
  """One method of a loss, and how much it counts."""

  name: str
  options: tuple[tuple[str, Any], ...] = ()
  coefficient: float = 1.0

  @property
  def entry(self) -> registry.Entry:
    return registry.entry(self.name)

  @property
  def needs(self) -> tuple[str, ...]:
    return tuple(registry.positional(self.entry.function))

  def __call__(self, inputs: Mapping[str, Any]) -> LossOutput:
    taken = {name: inputs[name] for name in self.needs if name in inputs}
    out = self.entry.function(**taken, **dict(self.options))
    if not isinstance(out, LossOutput):
      raise ValueError(
        f"loss {self.name!r} should return losses.LossOutput(loss, metrics),"
        " not the loss alone"
      )
    return out

  @property
  def kind(self) -> str:
    """The data it trains on: "paired", "unpaired", "ranked" or "sft"."""
    return _kind(self.needs)


@dataclasses.dataclass(frozen=True)
class Loss:
  """What to minimise; hashable, comparable. Made by `make` or `mix`.

  Call it with inputs by name, of which it takes those it needs and ignores the
  rest, or by position in the order of `needs`.
  """

  terms: tuple[Term, ...]
  divergence: str = "reverse_kl"
  divergence_alpha: float = 0.5
  ld_alpha: float = 1.0
  wpo: bool = False

  @property
  def name(self) -> str:
    """As `make` takes it, without hyper-parameters: "dpo", "dpo+0.2*sft"."""
    parts = (
      t.name if t.coefficient == 1 else f"{_spell(t.coefficient)}*{t.name}"
      for t in self.terms
    )
    return "+".join(parts)

  @property
  def options(self) -> tuple[tuple[str, Any], ...]:
    """All hyper-parameters, and the modifiers that change something. Those of
    a mixture are called "dpo.beta"."""
    alone = len(self.terms) == 1
    own = [
      (key if alone else f"{term.name}.{key}", value)
      for term in self.terms
      for key, value in term.options
    ]
    return tuple(own) + tuple(self.modifiers.items())

  @property
  def modifiers(self) -> dict[str, Any]:
    """Those that change something."""
    changed = {
      key: getattr(self, key)
      for key, neutral in MODIFIERS.items()
      if getattr(self, key) != neutral
    }
    if self.divergence != "alpha":
      changed.pop("divergence_alpha", None)
    return changed

  @property
  def needs(self) -> tuple[str, ...]:
    """Names of what the loss reads, in the order of its signature."""
    needs = dict.fromkeys(name for term in self.terms for name in term.needs)
    if self.wpo:
      needs |= dict.fromkeys(f"{side}_confidence" for side in SIDES)
    if self.ld_alpha != 1:
      needs |= dict.fromkeys(map(tail_of, logps_of_a_pair(tuple(needs))))
    return tuple(needs)

  @property
  def needs_reference(self) -> bool:
    return any(name.startswith("reference_") for name in self.needs)

  @property
  def kind(self) -> str:
    """The data it trains on: "paired", "unpaired", "ranked" or "sft"."""
    return _kind(self.needs)

  @property
  def responses(self) -> int:
    """How many responses an example of its data has at least."""
    if "policy_gold_logps" in self.needs:
      return 3
    return 2 if self.kind in ("paired", "ranked") else 1

  @property
  def mismatches(self) -> bool:
    """True where it reads completions of other examples (KTO)."""
    return "policy_kl_logps" in self.needs

  @property
  def needs_scores(self) -> bool:
    """True where it trains a reward model, not a policy."""
    return "chosen_scores" in self.needs

  @property
  def batch_coupled(self) -> bool:
    """True where one example's loss depends on the others of the batch."""
    return "weights" in self.needs or "state" in self.needs

  @property
  def reads_tails(self) -> bool:
    """True where it reads log-probs beyond the other response's length."""
    return any("_tail_" in name for name in self.needs)

  @property
  def reads_confidence(self) -> bool:
    return any(name.endswith("_confidence") for name in self.needs)

  def initial_state(self) -> Any:
    """What to hand in as `state` with the first batch; None if it has none."""
    states = [t.entry.state() for t in self.terms if t.entry.state]
    return states[0] if states else None

  def __call__(self, *arrays: jax.Array, **inputs: Any) -> LossOutput:
    inputs = self._named(arrays, inputs)
    # As each registered function does: nothing below is computed in bfloat16.
    inputs = {k: registry.promote(k, x) for k, x in inputs.items()}
    outputs = [run_modified(self, term, inputs) for term in self.terms]
    scaled = [
      (
        out.loss if t.coefficient == 1 else t.coefficient * out.loss,
        out.weights,
      )
      for t, out in zip(self.terms, outputs, strict=True)
    ]
    if len(outputs) == 1:
      return outputs[0]._replace(loss=scaled[0][0])
    metrics: dict[str, Any] = {}
    for term, out in zip(self.terms, outputs, strict=True):
      own = out.loss
      if out.weights is not None:
        own = Weighted(own, out.weights)
      metrics = {f"loss/{term.name}": own} | out.metrics | metrics
    return LossOutput(
      loss=sum(loss for loss, _ in scaled),
      metrics=metrics,
      state=next((o.state for o in outputs if o.state is not None), None),
      terms=tuple(scaled),
    )

  def _named(self, arrays, inputs) -> dict[str, Any]:
    """All inputs by name, none twice, none unknown, none missing."""
    if len(arrays) > len(self.needs):
      raise TypeError(
        f"loss {self.name!r} takes {', '.join(self.needs)}; given:"
        f" {len(arrays)} arrays"
      )
    placed = dict(zip(self.needs, arrays, strict=False))
    wrong = [n for n in inputs if n in placed or n not in INPUTS]
    if wrong:
      why = "is given twice" if wrong[0] in placed else (
        "is no input; hyper-parameters are fixed by `make`"
      )  # fmt: skip
      raise TypeError(f"loss {self.name!r}: {wrong[0]!r} {why}")
    given = inputs | placed
    required = {
      name
      for term in self.terms
      for name, p in registry.positional(term.entry.function).items()
      if p.default is inspect.Parameter.empty
    }
    modifiers = set(self.needs).difference(*(t.needs for t in self.terms))
    missing = [
      n for n in self.needs if n in required | modifiers and n not in given
    ]
    if missing:
      raise TypeError(
        f"loss {self.name!r} needs {', '.join(missing)}; given:"
        f" {', '.join(given)}"
      )
    return given


def _kind(needs) -> str:
  if "desirable" in needs:
    return "unpaired"
  if "policy_ranked_logps" in needs or "policy_gold_logps" in needs:
    return "ranked"
  if {"policy_rejected_logps", "rejected_scores"} & set(needs):
    return "paired"
  return "sft"


def _spell(coefficient: float) -> str:
  whole = coefficient.is_integer() and coefficient < 1e15
  return str(int(coefficient)) if whole else repr(coefficient)
