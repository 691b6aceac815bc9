"""DPO of an Equinox model, from token arrays to a trained policy.

    pip install . equinox optax  # in a checkout of dpo_jax
    python docs/examples/with_equinox.py

prints, for held-out pairs (policy and reference start out equal):

    initial: loss 0.693, accuracy 0.500
    final: loss 0.031, accuracy 1.000   (the digits of this line may vary)
"""

import equinox as eqx
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


class Model(eqx.Module):
  """Your language model here: i32[B T] -> f[B T V]."""

  embed: eqx.nn.Embedding
  mlp: eqx.nn.MLP

  def __init__(self, key):
    keys = jax.random.split(key)
    self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
    self.mlp = eqx.nn.MLP(WIDTH, VOCABULARY, WIDTH, depth=1, key=keys[1])

  def __call__(self, tokens):
    one = lambda token: self.mlp(self.embed(token))
    return jax.vmap(jax.vmap(one))(tokens)


def response_logps(model, tokens, mask):
  """log p(response | prompt), one entry an example."""
  # The logits at t predict the token at t + 1.
  logps = jax.nn.log_softmax(model(tokens[:, :-1]).astype(jnp.float32))
  picked = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
  return jnp.where(mask[:, 1:], picked, 0.0).sum(axis=-1)


def dpo_loss(model, reference, batch):
  logps = [
    response_logps(m, batch[side], batch[side + "_mask"])
    for m in (model, reference)
    for side in ("chosen", "rejected")
  ]
  out = losses.dpo(*logps, beta=0.3)
  return out.loss.mean(), out.metrics["rewards/accuracies"].mean()


def main(steps=30):
  train, held_out = pairs(seed=0), pairs(seed=1)
  model = reference = Model(jax.random.key(0))  # modules never change in place
  optimizer = optax.adam(3e-3)
  state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def train_step(model, reference, state, batch):
    # Gradients are of the first argument alone: the reference stays as it is.
    grad = eqx.filter_value_and_grad(dpo_loss, has_aux=True)
    (loss, _), grads = grad(model, reference, batch)
    updates, state = optimizer.update(grads, state)
    return eqx.apply_updates(model, updates), state, loss

  evaluate = eqx.filter_jit(dpo_loss)
  before = evaluate(model, reference, held_out)
  for _ in range(steps):
    model, state, _ = train_step(model, reference, state, train)
  after = evaluate(model, reference, held_out)

  result = {}
  for when, (loss, accuracy) in {"initial": before, "final": after}.items():
    print(f"{when}: loss {loss:.3f}, accuracy {accuracy:.3f}")
    result |= {f"{when}_loss": float(loss), f"{when}_accuracy": float(accuracy)}
  return result


if __name__ == "__main__":
  main()
