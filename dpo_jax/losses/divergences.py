"""f-DPO: what takes the log-ratio's place under other divergences than KL.

Maximising E[r] - beta D_f(pi || ref) gives r = beta f'(pi/ref) + const(x), so a
loss of the difference of two log-ratios becomes one of the difference of two
scores f'(u), u = pi(y|x) / ref(y|x). Wang et al. 2023 (2309.16240).

Length-normalised losses (`sigmoid_norm`, `ipo` by tokens) take scores as TRL
does, although of two lengths the constant does not cancel exactly, nor does it
under KL.
"""

import math

import jax

from dpo_jax.losses.base import tame_expm1

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def divergence_score(
  logratios: jax.Array, divergence: str, alpha: float = 0.5
) -> jax.Array:
  """f'(u) of log u, up to a constant; f[...] -> f[...], finite, increasing.

      reverse_kl   log u                          DPO
      js           log 2 + log sigmoid(log u)     = log(2u / (1 + u))
      forward_kl   1 - 1/u
      alpha        (u^(alpha-1) - 1) / (alpha-1)

  alpha = 1 is reverse_kl and alpha = 0 is forward_kl: alpha goes from the mass
  covering to the mode seeking. It is that of TRL from 0.29 on; the paper and
  earlier versions write (1 - u^-a) / a with a = 1 - alpha. Powers of u go on
  linearly beyond e^30 (float64: e^300), so that squares of scores stay finite.

  Args:
    logratios: f[...], log pi(y|x) - log ref(y|x).
    divergence: one of `DIVERGENCES`.
    alpha: read by "alpha" alone.

  Raises:
    ValueError: no divergence of that name.
  """
  if divergence not in DIVERGENCES:
    raise ValueError(
      f"divergence={divergence!r} should be one of {', '.join(DIVERGENCES)}"
    )
  if divergence == "js":
    return math.log(2) + jax.nn.log_sigmoid(logratios)
  power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(divergence, alpha - 1)
  if abs(power) < 1e-6:
    return logratios
  return tame_expm1(power * logratios) / power
