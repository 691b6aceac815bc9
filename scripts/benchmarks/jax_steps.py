"""The JAX variants: this package's step, and the concatenated step of others.

Each runs steps for ever, calling `pause` with what the compiler says when it is
ready, and after every step with the loss before that step's update.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.plan import plan
from benchmarks.problem import Problem
from dpo_jax import losses, optim
from dpo_jax.models import hf, llama
from dpo_jax.models import lora as lora_layers
from dpo_jax.score import Score
from dpo_jax.train_step import train_step
from dpo_jax.trainable import Trainable, join
from dpo_jax.update import TrainState

Pause = Callable[[dict[str, Any]], None]


def ours(
  problem: Problem,
  path: str,
  pause: Pause,
  attention: str = "auto",
  precomputed: bool = False,
  remat: str = "minimal",
  **options: Any,
) -> None:
  """`dpo_jax.train_step` on the rows that `dpo_jax.data.plan` packs; `options`
  are those of `Score`."""
  score, step, tx = make_step(problem, attention, remat, **options)
  planned = plan(problem)
  batches = [
    jax.tree.map(jnp.asarray, planned[i].batch) for i in range(len(planned))
  ]
  state, reference, frozen = start(problem, path, tx)
  if precomputed:
    scored, known = jax.jit(score), join(frozen or {}, reference)
    batches = [b._replace(reference=scored(known, b)) for b in batches]
    reference = None
  _run(pause, step, state, reference, batches, frozen)


def make_step(
  problem: Problem, attention: str, remat: str, **options: Any
) -> tuple[Score, Callable[..., Any], optax.GradientTransformation]:
  """How responses are scored, the step, and its optimizer."""
  model = problem.model(attention=attention, remat=remat)
  score = Score(model, tile=problem.head_tile, **options)
  tx = _optimizer(problem)
  loss = losses.make("dpo", beta=problem.beta)
  return score, functools.partial(train_step, score=score, loss=loss, tx=tx), tx


def concat(
  problem: Problem,
  path: str,
  pause: Pause,
  attention: str = "dense",
  remat: str = "none",
) -> None:
  """The same model and weights the common way: chosen and rejected stacked on
  the batch axis and padded, plain causal attention, float32 logits of every
  position, all kept that derivatives read; the reference's forward in the same
  program."""
  if problem.lora:
    raise ValueError("concat has no adapters")
  model = problem.model(attention=attention, remat=remat)
  tx = _optimizer(problem)

  def logps(variables, batch):
    tokens, prompts, ends = batch
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.apply(variables, tokens, index, index * 0, index + 1)
    head = model.unembed(variables)
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    logps = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    target = index[:, 1:]
    scored = (target >= prompts[:, None]) & (target < ends[:, None])
    chosen, rejected = jnp.split((logps * scored).sum(axis=-1), 2)
    return chosen, rejected

  def step(state, reference, batch, _):
    known = logps(reference, batch)

    def objective(params):
      policy = logps(params, batch)
      out = losses.dpo(*policy, *known, beta=problem.beta)
      return out.loss.mean(), policy[0].mean()

    (loss, chosen), grads = jax.value_and_grad(objective, has_aux=True)(
      state.params
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, opt_state, state.skipped)
    found = {"loss": loss, "logps/chosen": chosen}
    return state, {k: losses.Sums(x, jnp.float32(1)) for k, x in found.items()}

  batches = [jax.tree.map(jnp.asarray, batch) for batch in problem.padded()]
  state, reference, _ = start(problem, path, tx)
  _run(pause, step, state, reference, batches, None)


def _run(pause, step, state, reference, batches, frozen):
  step, compiled = jax.jit(step, donate_argnums=0), {}
  for batch in batches:
    shape = jax.tree.map(jnp.shape, batch)
    if str(shape) not in compiled:
      lowered = step.lower(state, reference, batch, frozen)
      compiled[str(shape)] = lowered.compile()
  memory = [x.memory_analysis() for x in compiled.values()]
  memory = [m for m in memory if m is not None]
  pause({
    "device": jax.devices()[0].device_kind,
    "temp_bytes": max((m.temp_size_in_bytes for m in memory), default=None),
    "planned_bytes": max(map(_planned, memory), default=None),
    "shapes": len(compiled),
  })  # fmt: skip
  for batch in itertools.cycle(batches):
    run = compiled[str(jax.tree.map(jnp.shape, batch))]
    state, sums = run(state, reference, batch, frozen)
    jax.block_until_ready((state, sums))
    stats = jax.devices()[0].memory_stats() or {}
    pause({
      "loss": float(sums["loss"].mean()),
      "logps": float(sums["logps/chosen"].mean()),
      "device_peak": stats.get("peak_bytes_in_use"),
    })  # fmt: skip


def _planned(m):
  """Bytes that the program is planned to hold: arguments, results, between."""
  return (
    m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
  ) - m.alias_size_in_bytes


def _optimizer(problem):
  return optim.make(optax.constant_schedule(problem.learning_rate))


def start(
  problem: Problem, path: str, tx: optax.GradientTransformation
) -> tuple[TrainState, Any, Any]:
  """TrainState, reference and frozen variables; of the weights in the folder,
  or without one drawn as `Problem.save_weights` draws them."""
  model = problem.model()
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  init = jax.jit(model.init_variables)

  def weights():
    if not path:
      return init(jax.random.key(problem.seed))
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract
    )
    return hf.load_variables(path, llama.HF_NAMES, shapes)

  variables, zero = weights(), jnp.int32(0)
  if not problem.lora:
    state = TrainState(zero, variables, tx.init(variables), zero + 0)
    return state, weights(), None
  # What is trained is small, so nothing is read twice.
  adapters = lora_layers.Lora(problem.lora)
  variables["lora"] = jax.jit(
    lambda key: lora_layers.init(key, abstract["params"], adapters)
  )(jax.random.key(problem.seed + 1))
  trained, frozen = Trainable(variables).split(variables)
  state = TrainState(zero, trained, tx.init(trained), zero + 0)
  return state, {}, frozen  # the reference is what is frozen
