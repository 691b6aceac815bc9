"""How far the policy went, token by token, and how dear that is to be."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import at_least_float32, check_choice, tame_expm1


def kl_estimate(
  logps: jax.Array, reference_logps: jax.Array, kind: str = "k1"
) -> jax.Array:
  """KL(pi || ref) estimated from tokens that pi drew, f[...] -> f32[...].

      k1   log(pi / ref)                     unbiased, of either sign
      k2   log(pi / ref)^2 / 2               biased, little noise
      k3   ref/pi - 1 - log(ref / pi)        unbiased, never negative

  Schulman 2020, "Approximating KL divergence". That holds for values: as a term
  of a loss their gradients at pi have other means. That of k1 is 0, that of k2
  is the gradient of KL(pi || ref), and that of k3 the one of KL(ref || pi).
  k3 goes on linearly beyond a log-ratio of 30 (float64: 300).

  Args:
    logps: f[...], log pi of each drawn token.
    reference_logps: f[...].
    kind: "k1", "k2" or "k3".

  Raises:
    ValueError: no estimator of that name.
  """
  check_choice("kind", kind, "k1", "k2", "k3")
  back = at_least_float32(reference_logps) - at_least_float32(logps)
  if kind == "k1":
    return -back
  return 0.5 * back**2 if kind == "k2" else tame_expm1(back) - back


def adapt(
  coefficient: jax.Array | float,
  kl: jax.Array | float,
  target: float,
  horizon: float,
  n: int,
) -> jax.Array:
  """Next KL coefficient, Ziegler et al. 2019 (1909.08593), section 2.2.

      coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)

  Theirs is written with K = 0.1 in place of n / horizon; their code and TRL's
  have the latter, so that the pace does not depend on the batch size.

  Args:
    coefficient: f[], what a nat cost so far.
    kl: f[], KL seen with it, nats a response.
    target: KL to be held, above 0; nats a response.
    horizon: episodes in which a fifth is gained or lost at most; 10 000 there.
    n: episodes since the last change.
  """
  error = jnp.clip(kl / target - 1, -0.2, 0.2)
  return at_least_float32(coefficient) * (1 + error * n / horizon)
