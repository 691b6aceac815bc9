"""From names and options to a `Loss`, or the reason why there is none."""

import dataclasses
import re
from typing import Any

from dpo_jax.losses import registry
from dpo_jax.losses.base import check_range
from dpo_jax.losses.loss import Loss, Term
from dpo_jax.losses.meaning import check_meaning
from dpo_jax.losses.registry import MODIFIERS

# A "+" between terms: outside of brackets, and not that of 1e+2.
_PLUS = re.compile(r"(?<![\d.][eE])\+(?![^()]*\))")
_TERM = re.compile(r"(?:([^*()]*)\*)?([^*()]*)(?:\(([^()]*)\))?", re.S)


def make(name: str, **options: Any) -> Loss:
  """Fixes a loss and its hyper-parameters.

  >>> make("dpo", beta=0.2)
  >>> make("dpo+0.005*sft", beta=0.2)  # a mixture (RPO)
  >>> make("0.8*dpo(beta=0.1) + 0.2*bco_pair(beta=0.01) + sft")  # MPO
  >>> make("dpo", divergence="js", wpo=True)  # modifiers

  Args:
    name: a registered loss, or several joined by "+", each with an optional
      coefficient in front and hyper-parameters in brackets. A mixture is the
      weighted sum of its terms' means.
    **options: hyper-parameters, by name; of a mixture, each goes to every term
      that has it, and "term.name" to one. And the modifiers:
      divergence: "reverse_kl", "forward_kl", "js" or "alpha", see
        `divergence_score`; divergence_alpha is read by "alpha".
      ld_alpha: below 1 counts what exceeds the other response's length less,
        see `desensitize`.
      wpo: weighs pairs by the policy's confidence, see `wpo_weights`.

  Raises:
    ValueError: unknown name or hyper-parameter, a value of the wrong type or
      out of range, or a combination without a meaning.
  """
  terms = _parse(name)
  _check_known(name, terms, options)
  modifiers = {
    key: registry.checked(f"loss {name!r}", key, options[key], default)
    for key, default in MODIFIERS.items()
    if key in options
  }
  return check_meaning(
    Loss(tuple(_with_options(t, options) for t in terms), **modifiers)
  )


def mix(*parts: tuple[float, Loss], **modifiers: Any) -> Loss:
  """The weighted sum of losses that were made one by one.

  >>> mix((0.8, make("dpo", beta=0.1)), (0.2, make("bco_pair", beta=0.01)))

  Args:
    *parts: (coefficient, loss).
    **modifiers: as in `make`; they hold for the whole mixture.

  Raises:
    ValueError: no part, a part with modifiers of its own, or a combination
      without a meaning.
  """
  if not parts:
    raise ValueError("a mixture needs a part, as in mix((1.0, make('dpo')))")
  terms = []
  for coefficient, loss in parts:
    if loss.modifiers:
      raise ValueError(
        f"loss {loss.name!r} has modifiers of its own"
        f" ({', '.join(loss.modifiers)}); give them to the mixture"
      )
    check_range("coefficient", coefficient, 1e-9, float("inf"))
    terms += [
      dataclasses.replace(t, coefficient=float(coefficient * t.coefficient))
      for t in loss.terms
    ]
  for key, value in modifiers.items():
    if key not in MODIFIERS:
      raise ValueError(
        f"no modifier {key!r}{registry.suggest(key, MODIFIERS)}; there are"
        f" {', '.join(MODIFIERS)}"
      )
    modifiers[key] = registry.checked("mix", key, value, MODIFIERS[key])
  return check_meaning(Loss(tuple(terms), **modifiers))


def defaults(name: str) -> dict[str, Any]:
  """Hyper-parameters of a loss and their defaults; those of a mixture are
  called "dpo.beta".

  Raises:
    ValueError: no loss of that name; the message names the known ones.
  """
  terms = _parse(name)
  if len(terms) == 1:
    return registry.options_of(terms[0].name) | dict(terms[0].options)
  return {
    f"{term.name}.{key}": value
    for term in terms
    for key, value in (
      registry.options_of(term.name) | dict(term.options)
    ).items()
  }


def _parse(name: str) -> list[Term]:
  """Terms with what their brackets say, unchecked but for names."""
  if not isinstance(name, str):
    raise ValueError(f"loss {name!r} should be a name, as 'dpo'")
  terms = []
  for part in _PLUS.split(name):
    found = _TERM.fullmatch(part.strip())
    if not found:
      raise ValueError(
        f"loss {name!r}: {part.strip()!r} should look like 'dpo', '0.2*sft' or"
        " 'dpo(beta=0.1)'"
      )
    coefficient, term, inner = (x and x.strip() for x in found.groups())
    try:
      value = 1.0 if coefficient is None else float(coefficient)
    except ValueError:
      raise ValueError(
        f"loss {name!r}: {coefficient!r} should be a number, as in"
        " 'dpo+0.2*sft'"
      ) from None
    check_range(f"coefficient of {term!r}", value, 1e-9, float("inf"))
    registry.entry(term)
    options = dict(
      _option(name, text) for text in (inner or "").split(",") if text
    )
    terms.append(Term(term, tuple(options.items()), value))
  return terms


def _option(name, text) -> tuple[str, Any]:
  key, equals, value = (x.strip() for x in text.partition("="))
  if not equals:
    raise ValueError(
      f"loss {name!r}: {text.strip()!r} should be key=value, as in"
      " 'dpo(beta=0.1)'"
    )
  try:
    return key, float(value)
  except ValueError:
    return key, {"True": True, "False": False}.get(value, value)


def _check_known(name, terms, options) -> None:
  own = {key for t in terms for key in registry.options_of(t.name)}
  own |= {f"{t.name}.{k}" for t in terms for k in registry.options_of(t.name)}
  asked = [(key, own | MODIFIERS.keys()) for key in options]
  asked += [
    (key, registry.options_of(t.name).keys())
    for t in terms
    for key, _ in t.options
  ]
  for key, known in asked:
    if key not in known:
      has = ", ".join(sorted(own)) or "none"
      raise ValueError(
        f"loss {name!r} has no hyper-parameter {key!r}"
        f"{registry.suggest(key, known)}; it has: {has}; and any loss the"
        f" modifiers {', '.join(MODIFIERS)}"
      )


def _with_options(term: Term, options: dict[str, Any]) -> Term:
  """The nearest word counts: brackets, then "term.key", then "key"."""
  own = registry.options_of(term.name)
  given = {k: v for k, v in options.items() if k in own}
  prefix = f"{term.name}."
  given |= {
    k.removeprefix(prefix): v
    for k, v in options.items()
    if k.startswith(prefix)
  }
  given |= dict(term.options)
  checked = {
    key: registry.checked(f"loss {term.name!r}", key, value, own[key])
    for key, value in given.items()
  }
  return dataclasses.replace(
    term, options=tuple(sorted((own | checked).items()))
  )
