"""A loss of one's own, and a loss that carries state from batch to batch.

    pip install .  # in a checkout of dpo_jax; needs jax alone
    python docs/examples/own_loss.py

prints, for a policy that is a table of logits:

    initial: loss 0.526, accuracy 0.500
    final: loss 0.100, accuracy 1.000
    bco: loss 0.693 to 0.512, shift 0.099
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses

PROMPTS, ANSWERS, BATCH = 8, 6, 32


# Parameters say what it needs: log-probs by their names in `losses.INPUTS`,
# then hyper-parameters with defaults. From here on `losses.make` knows it.
@losses.register
def focal(
  policy_chosen_logps,
  policy_rejected_logps,
  reference_chosen_logps,
  reference_rejected_logps,
  *,
  beta=0.1,
  gamma=1.0,
):
  """DPO that looks away from settled pairs: (1 - p)^gamma * -log p."""
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  doubt = jax.nn.sigmoid(rejected - chosen)
  return losses.LossOutput(
    -(doubt**gamma) * jax.nn.log_sigmoid(chosen - rejected),
    losses.pair_metrics(
      chosen, rejected, policy_chosen_logps, policy_rejected_logps
    ),
  )


def logps(table, prompts, answers):
  """log p(answer | prompt); here an answer is one token."""
  return jax.nn.log_softmax(table)[prompts, answers]


def main(steps=30):
  """Pairs, with the loss above in a mixture."""
  loss = losses.make("focal+0.1*sft", beta=0.5, gamma=1.0)
  rng = np.random.default_rng(0)
  prompts = rng.integers(PROMPTS, size=BATCH)
  chosen = prompts % ANSWERS
  rejected = (chosen + rng.integers(1, ANSWERS, BATCH)) % ANSWERS
  table = reference = jnp.zeros((PROMPTS, ANSWERS))

  def objective(table):
    out = loss(  # by name; `loss.needs` lists them
      policy_chosen_logps=logps(table, prompts, chosen),
      policy_rejected_logps=logps(table, prompts, rejected),
      reference_chosen_logps=logps(reference, prompts, chosen),
      reference_rejected_logps=logps(reference, prompts, rejected),
      chosen_lengths=jnp.ones(BATCH),
    )
    # A mixture is the sum of its terms' means, each with weights of its own.
    means = {name: sums.mean() for name, sums in losses.reduce(out).items()}
    return means["loss"], means

  gradient = jax.jit(jax.grad(objective, has_aux=True))
  _, before = gradient(table)
  for _ in range(steps):
    table -= 3.0 * gradient(table)[0]
  _, after = gradient(table)

  result = {}
  for when, means in {"initial": before, "final": after}.items():
    value, accuracy = float(means["loss"]), float(means["rewards/accuracies"])
    print(f"{when}: loss {value:.3f}, accuracy {accuracy:.3f}")
    result |= {f"{when}_loss": value, f"{when}_accuracy": accuracy}
  return result


def with_state(steps=30):
  """Thumbs up or down with BCO, whose reward shift is a running mean.

  To evaluate, pass the state and `training=False`, which leaves it as it is.
  """
  loss = losses.make("bco", beta=0.5)
  rng = np.random.default_rng(0)
  table = reference = jnp.zeros((PROMPTS, ANSWERS))
  state, values = loss.initial_state(), []

  @jax.jit
  def train_step(table, state, prompts, answers):
    def objective(table):
      out = loss(
        policy_logps=logps(table, prompts, answers),
        reference_logps=logps(reference, prompts, answers),
        desirable=answers == prompts % ANSWERS,
        state=state,
      )
      return out.loss.mean(), (out.state, out.metrics["delta"][0])

    grad = jax.value_and_grad(objective, has_aux=True)
    (value, (new_state, delta)), grads = grad(table)
    return table - 3.0 * grads, new_state, value, delta

  for _ in range(steps):
    prompts = rng.integers(PROMPTS, size=BATCH)
    wrong = rng.integers(ANSWERS, size=BATCH)
    answers = np.where(rng.random(BATCH) < 0.5, prompts % ANSWERS, wrong)
    # The state goes in with a batch and comes out for the next.
    table, state, value, delta = train_step(table, state, prompts, answers)
    values.append(float(value))
  print(f"bco: loss {values[0]:.3f} to {values[-1]:.3f}, shift {delta:.3f}")
  return {"initial_loss": values[0], "final_loss": values[-1]}


if __name__ == "__main__":
  main()
  with_state()
