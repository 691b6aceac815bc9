"""DPO of a flax.nnx model, from token arrays to a trained policy.

    pip install . flax optax  # in a checkout of dpo_jax
    python docs/examples/with_nnx.py

prints, for held-out pairs (policy and reference start out equal):

    initial: loss 0.693, accuracy 0.500
    final: loss 0.157, accuracy 1.000   (the digits of this line may vary)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

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


class Model(nnx.Module):
  """Your language model here: i32[B T] -> f[B T V]."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

  def __call__(self, tokens):
    return self.head(nnx.gelu(self.hidden(self.embed(tokens))))


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


@nnx.jit
def train_step(model, reference, optimizer, batch):
  # Gradients are of the first argument alone: the reference stays as it is.
  grad = nnx.value_and_grad(dpo_loss, has_aux=True)
  (loss, _), grads = grad(model, reference, batch)
  optimizer.update(model, grads)
  return loss


def main(steps=30):
  train, held_out = pairs(seed=0), pairs(seed=1)
  model = Model(nnx.Rngs(0))
  reference = nnx.clone(model)  # training changes `model` itself
  optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

  evaluate = nnx.jit(dpo_loss)
  before = evaluate(model, reference, held_out)
  for _ in range(steps):
    train_step(model, reference, optimizer, train)
  after = evaluate(model, reference, held_out)

  result = {}
  for when, (loss, accuracy) in {"initial": before, "final": after}.items():
    print(f"{when}: loss {loss:.3f}, accuracy {accuracy:.3f}")
    result |= {f"{when}_loss": float(loss), f"{when}_accuracy": float(accuracy)}
  return result


if __name__ == "__main__":
  main()
