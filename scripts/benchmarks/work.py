"""Matrix products that a step of a problem needs, in FLOPs."""

import math

import flax.traverse_util as traverse
import jax
import numpy as np

from benchmarks.problem import Problem
from dpo_jax import flops
from dpo_jax.models.lora import Lora
from dpo_jax.models.lora import init as init_adapters
from dpo_jax.trainable import Trainable


def needed(problem: Problem, reference: bool = True) -> float:
  """FLOPs that a step needs at least, see `dpo_jax.flops`, averaged over the
  batches.

  Args:
    problem: sizes.
    reference: whether the step runs the reference's forward.
  """
  config, key = problem.model_config(), jax.random.key(0)
  variables = jax.eval_shape(problem.model().init_variables, key)
  if problem.lora:
    variables["lora"] = jax.eval_shape(
      lambda key: init_adapters(key, variables["params"], Lora(problem.lora)),
      key,
    )
  trainable = Trainable(variables)
  trained = traverse.flatten_dict(trainable.split(variables)[0], sep="/")
  costs = flops.Costs(
    config,
    trainable.layers(),
    {
      path: math.prod(x.shape[1:])
      for path, x in trained.items()
      if path.startswith("lora/")
    },
  )
  prompts, *responses = np.array(problem.lengths).T
  work = flops.work(config, prompts, np.stack(responses, axis=1))
  total = costs.forward(work, adapters=True) + costs.backward(work)
  return (total + reference * costs.forward(work)) / problem.batches


def concatenated(problem: Problem) -> float:
  """FLOPs of the common way, averaged over the batches: two full sequences a
  pair, padded to the longest of their batch, every position through the head
  and all T^2 keys; a forward and a backward of what is trained (2 or 3 units)
  and the reference's forward (1)."""
  c = problem.model_config()
  width = c.heads * c.head_dim
  layer = 2 * c.width * (width + c.kv_heads * c.head_dim)
  layer += 3 * c.width * c.ffn  # multiply-adds a token
  units = 3 if problem.lora else 4
  total = 0
  lengths = np.array(problem.lengths)
  longest = (lengths[:, :1] + lengths[:, 1:]).max(axis=1)
  for t in longest.reshape(problem.batches, problem.pairs).max(axis=1):
    sequences = 2 * problem.pairs
    of_token = layer * c.layers + c.vocab_size * c.width
    seen = 2 * width * int(t) ** 2 * c.layers
    total += 2 * sequences * (of_token * int(t) + seen)
  return units * total / problem.batches
