"""The JAX variants: this package's step, and the concatenated step of others.

Each runs steps for ever, calling `pause` with what the compiler says when it is
ready, and after every step with the loss before that step's update.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.problem import Problem, state_and_reference
from dpo_jax import losses, optim
from dpo_jax.data.pack import token_cost
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples
from dpo_jax.models import llama
from dpo_jax.score import Score
from dpo_jax.train_step import TrainState, train_step

Pause = Callable[[dict[str, Any]], None]


def ours(
  problem: Problem,
  path: str,
  pause: Pause,
  attention: str = "blockwise",
  precomputed: bool = False,
  **options: Any,
) -> None:
  """`dpo_jax.train_step` on the rows that `dpo_jax.data.plan` packs; `options`
  are those of `Score`."""
  compute = llama.Compute(attention=attention)
  score = Score(llama.Model(problem.model_config(), compute), **options)
  step = functools.partial(
    train_step,
    score=score,
    loss=losses.make("dpo", beta=problem.beta),
    tx=_optimizer(problem),
  )
  batch = jax.tree.map(jnp.asarray, _plan(problem)[0].batch)
  if precomputed:
    _, reference = state_and_reference(problem, path, _optimizer(problem))
    batch = batch._replace(reference=jax.jit(score)(reference, batch))
  _run(problem, path, pause, step, batch)


def concat(
  problem: Problem, path: str, pause: Pause, attention: str = "dense"
) -> None:
  """The same model and weights the common way: chosen and rejected stacked on
  the batch axis, plain causal attention, float32 logits of every position;
  the reference's forward in the same program."""
  compute = llama.Compute(attention=attention)
  model = llama.Model(problem.model_config(), compute)
  tx = _optimizer(problem)

  def logps(variables, tokens):
    rows, length = tokens.shape
    index = jnp.broadcast_to(jnp.arange(length), (rows, length))
    hidden = model.apply(variables, tokens, index, index * 0, index + 1)
    head = model.unembed(variables)
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    logps = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    scored = index[:, 1:] >= problem.prompt
    chosen, rejected = jnp.split((logps * scored).sum(axis=-1), 2)
    return chosen, rejected

  def step(state, reference, tokens):
    known = logps(reference, tokens)

    def objective(params):
      out = losses.dpo(*logps(params, tokens), *known, beta=problem.beta)
      return out.loss.mean()

    loss, grads = jax.value_and_grad(objective)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, opt_state, state.skipped)
    return state, {"loss": losses.Sums(loss, jnp.float32(1))}

  prompts, chosen, rejected = problem.draw()
  tokens = np.concatenate([np.tile(prompts, (2, 1)), [*chosen, *rejected]], 1)
  _run(problem, path, pause, step, jnp.asarray(tokens))


def _run(problem, path, pause, step, batch):
  state, reference = state_and_reference(problem, path, _optimizer(problem))
  compiled = jax.jit(step, donate_argnums=0)
  compiled = compiled.lower(state, reference, batch).compile()
  pause({"temp_bytes": compiled.memory_analysis().temp_size_in_bytes})
  while True:
    state, sums = compiled(state, reference, batch)
    loss = float(sums["loss"].mean())
    jax.block_until_ready(state)
    pause({"loss": loss})


def _optimizer(problem):
  return optim.make(optax.constant_schedule(problem.learning_rate))


def _plan(problem: Problem) -> Plan:
  prompts, chosen, rejected = problem.draw()
  n = problem.pairs
  length = problem.prompt + 2 * problem.response
  tokens = np.concatenate([prompts, chosen, rejected], axis=1).reshape(-1)
  examples = Examples(
    tokens=tokens,
    offsets=np.arange(n + 1) * length,
    prompt_lengths=np.full(n, problem.prompt, np.int32),
    lengths=np.full((n, 2), problem.response, np.int32),
    desirable=np.ones(n, bool),
    rows=np.arange(n),
    subsets=np.zeros(n, np.int32),
    subset_names=("random",),
    kind="paired",
    format="random",
    report={},
    fingerprint=repr(problem),
  )
  assert token_cost(problem.prompt, problem.response, problem.response) < length
  return Plan(examples, batch_size=n, shuffle=False)
