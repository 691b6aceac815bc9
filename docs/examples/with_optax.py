"""DPO in plain JAX and optax, from token arrays to a trained policy.

    pip install . optax  # in a checkout of dpo_jax
    python docs/examples/with_optax.py

prints, for held-out pairs (policy and reference start out equal):

    initial: loss 0.693, accuracy 0.500
    final: loss 0.013, accuracy 1.000   (the digits of this line may vary)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import losses

VOCABULARY, LENGTH, WIDTH = 16, 12, 32


def pairs(seed, count=64):
  """Padded pairs: the chosen response counts up, the rejected one down."""
  rng, at, batch = np.random.default_rng(seed), np.arange(LENGTH), {}
  word = rng.integers(VOCABULARY, size=(count, 1))
  start = rng.integers(2, 6, (count, 1))  # before it the prompt: word word ...
  for side, step in (("chosen", 1), ("rejected", -1)):
    end = start + rng.integers(3, 7, (count, 1))
    tokens = (word + step * np.maximum(0, at - start + 1)) % VOCABULARY
    batch[side] = np.where(at < end, tokens, 0)
    batch[side + "_mask"] = (at >= start) & (at < end)  # the response
  return batch


def init(key):
  keys = jax.random.split(key, 3)
  return {
    "embed": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
    "hidden": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5,
    "head": jax.random.normal(keys[2], (WIDTH, VOCABULARY)) / WIDTH**0.5,
  }


def logits(params, tokens):
  """Your language model here: i32[B T] -> f[B T V]."""
  hidden = jax.nn.gelu(params["embed"][tokens] @ params["hidden"])
  return hidden @ params["head"]


def response_logps(params, tokens, mask):
  """log p(response | prompt), one entry an example."""
  # The logits at t predict the token at t + 1.
  logps = jax.nn.log_softmax(logits(params, tokens[:, :-1]).astype(jnp.float32))
  picked = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
  return jnp.where(mask[:, 1:], picked, 0.0).sum(axis=-1)


def dpo_loss(params, reference, batch):
  logps = [
    response_logps(p, batch[side], batch[side + "_mask"])
    for p in (params, reference)
    for side in ("chosen", "rejected")
  ]
  out = losses.dpo(*logps, beta=0.3)
  return out.loss.mean(), out.metrics["rewards/accuracies"].mean()


def main(steps=30):
  train, held_out = pairs(seed=0), pairs(seed=1)
  params = reference = init(jax.random.key(0))  # arrays never change in place
  optimizer = optax.adam(3e-3)
  state = optimizer.init(params)

  @jax.jit
  def train_step(params, reference, state, batch):
    # Gradients are of the first argument alone: the reference stays as it is.
    grad = jax.value_and_grad(dpo_loss, has_aux=True)
    (loss, _), grads = grad(params, reference, batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  evaluate = jax.jit(dpo_loss)
  before = evaluate(params, reference, held_out)
  for _ in range(steps):
    params, state, _ = train_step(params, reference, state, train)
  after = evaluate(params, reference, held_out)

  result = {}
  for when, (loss, accuracy) in {"initial": before, "final": after}.items():
    print(f"{when}: loss {loss:.3f}, accuracy {accuracy:.3f}")
    result |= {f"{when}_loss": float(loss), f"{when}_accuracy": float(accuracy)}
  return result


if __name__ == "__main__":
  main()
