"""PPO's rewards, advantages and losses against TRL's own code, drawn anew at
each run.

TRL had PPO until 1.12, within one long function: its statements are read from
that release (by pip, without installing it) and run on numbers drawn here. Its
score arrives one place after the last token where there is room, and that place
has a value of its own; ours arrives at the last token. The comparison is
therefore of responses one longer, whose last token costs no KL.
"""

import functools
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses

from .live import (
  PAIRS,
  WHY,
  WIDTH,
  array,
  both_precisions,
  check,
  rng,
  tensor,
  tolerance,
)

torch = pytest.importorskip("torch", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]

RELEASE = "trl==1.12.0"
FILE = "trl/experimental/ppo/ppo_trainer.py"


@functools.cache
def source():
  """The file of TRL that holds its PPO."""
  with tempfile.TemporaryDirectory() as folder:
    fetched = subprocess.run(
      [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d",
       folder, RELEASE],
      capture_output=True, text=True,
    )  # fmt: skip
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if fetched.returncode or not wheels:
      pytest.skip(f"no {RELEASE} from pip: {fetched.stderr[-200:]}")
    return zipfile.ZipFile(wheels[0]).read(FILE).decode()


def statements(first, last):
  """Lines of that file from the one that begins with `first` to before the one
  that begins with `last`."""
  lines = source().splitlines()
  begins = lambda text, start: next(
    i
    for i, line in enumerate(lines)
    if i >= start and line.strip().startswith(text)
  )
  start = begins(first, 0)
  return textwrap.dedent("\n".join(lines[start : begins(last, start + 1)]))


def run(names, *parts):
  """Runs statements of TRL where `names` are known; returns all names."""
  known = {"torch": torch, **names}
  helpers = ("def masked_mean", "class PolicyAndValueWrapper")
  for part in (helpers, *parts):
    exec(statements(*part), known)
  return types.SimpleNamespace(**known)


def draw(rng, x64):
  """Per-token numbers of responses, the last index of each, TRL's masks."""
  rows, width = 2 * PAIRS, WIDTH
  ends = rng.integers(0, width, rows)
  ends[0] = width - 1
  place = np.arange(width)
  names = {
    "logprobs": -rng.exponential(1.0, (rows, width)),
    "ref_logprobs": -rng.exponential(1.0, (rows, width)),
    "values": rng.normal(size=(rows, width)),
  }
  outside, outside_p1 = place > ends[:, None], place > ends[:, None] + 1
  for name in ("logprobs", "ref_logprobs"):
    names[name] = np.where(outside, 1.0, names[name])
  names["values"] = np.where(outside_p1, 0.0, names["values"])
  names["scores"] = rng.normal(size=rows)
  names = {k: tensor(x, x64) for k, x in names.items()}
  names |= {
    "responses": torch.zeros(rows, width),
    "sequence_lengths": torch.tensor(ends),
    "sequence_lengths_p1": torch.tensor(ends + 1),
    "padding_mask": torch.tensor(outside),
    "padding_mask_p1": torch.tensor(outside_p1),
    "empty_cache": lambda: None,
  }
  return names


@both_precisions
@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("whiten", [False, True], ids=["plain", "white"])
def test_rewards_advantages_and_returns_are_trls(rng, x64, kind, whiten):
  names = draw(rng, x64)
  args = types.SimpleNamespace(
    kl_estimator=kind, kl_coef=float(rng.uniform(0.01, 1)),
    whiten_rewards=whiten, gamma=float(rng.uniform(0.9, 1)),
    lam=float(rng.uniform(0.5, 1)),
  )  # fmt: skip
  theirs = run(
    names | {"args": args},
    ("# 4. compute rewards", "# Do multiple epochs"),
  )
  with jax.enable_x64(x64):
    ours = {k: array(names[k], x64) for k in ("logprobs", "ref_logprobs")}
    within = ~jnp.asarray(names["padding_mask"].numpy())
    within_p1 = ~jnp.asarray(names["padding_mask_p1"].numpy())
    rewards = losses.shaped_rewards(
      array(names["scores"], x64), *ours.values(), within_p1.sum(axis=1),
      args.kl_coef, kind,
    )  # fmt: skip
    if whiten:
      rewards = losses.whiten(rewards, within_p1, shift_mean=False)
    advantages, returns = losses.gae(
      rewards, array(names["values"], x64), within_p1,
      gamma=args.gamma, lam=args.lam,
    )  # fmt: skip
    advantages = losses.whiten(advantages, within)
  # TRL's variance has a factor in float32.
  rtol = max(tolerance(x64, False), 1e-6)
  check(rewards, theirs.rewards, rtol)
  check(advantages, theirs.advantages, rtol)
  check(returns, np.where(within_p1, theirs.returns, 0), rtol)


@both_precisions
def test_policy_and_value_losses_are_trls(rng, x64):
  """With ratios and values on both sides of the clips."""
  names = draw(rng, x64)
  shape = names["values"].shape
  outside = names["padding_mask"].numpy()
  outside_p1 = names["padding_mask_p1"].numpy()
  # Both leave what is outside at what it was, so that the ratio is 1.
  moved = np.where(outside, 0.0, rng.normal(0, 0.3, shape))
  new_logps = tensor(names["logprobs"].numpy() + moved, x64, requires_grad=True)
  new_values = np.where(outside_p1, 0.0, rng.normal(size=shape))
  new_values = tensor(new_values, x64, requires_grad=True)
  advantages = tensor(rng.normal(size=shape), x64)
  returns = tensor(rng.normal(size=shape), x64)
  clip, clip_value = (float(c) for c in rng.uniform(0.05, 0.5, 2))
  args = types.SimpleNamespace(
    cliprange=clip, cliprange_value=clip_value, vf_coef=0.3
  )
  theirs = run(
    names
    | {
      "args": args, "micro_batch_inds": slice(None), "vpred": new_values,
      "mb_values": names["values"], "mb_return": returns,
      "new_logprobs": new_logps, "mb_logprobs": names["logprobs"],
      "mb_advantage": advantages,
    },
    ("vpredclipped = ", "accelerator.backward(loss)"),
    ("pg_clipfrac = ", "prob_dist = "),
  )  # fmt: skip
  theirs.loss.backward()

  with jax.enable_x64(x64):
    old_logps, old_values = (
      array(names[k], x64) for k in ("logprobs", "values")
    )

    def objective(logps, values):
      policy = losses.ppo_policy(
        logps, old_logps, array(advantages, x64), clip=clip
      )
      value = losses.ppo_value(
        values, old_values, array(returns, x64), clip=clip_value
      )
      policy = losses.reduce(policy, array(~outside, x64))
      value = losses.reduce(value, array(~outside_p1, x64))
      means = {"policy": policy["loss"].mean(), "value": value["loss"].mean()}
      means |= {k: s.mean() for k, s in (policy | value).items() if k != "loss"}
      return means["policy"] + 0.3 * means["value"], means

    (loss, means), slopes = jax.value_and_grad(
      objective, argnums=(0, 1), has_aux=True
    )(array(new_logps.detach(), x64), array(new_values.detach(), x64))
  rtol = tolerance(x64, False)
  check(loss, theirs.loss.item(), rtol)
  check(means["policy"], theirs.pg_loss.item(), rtol)
  check(means["value"], theirs.vf_loss.item(), rtol)
  # TRL counts in float32.
  check(means["policy/clipfrac_avg"], theirs.pg_clipfrac.item(), 1e-6)
  check(means["val/clipfrac_avg"], theirs.vf_clipfrac.item(), 1e-6)
  check(slopes[0], new_logps.grad, rtol)
  check(slopes[1], new_values.grad, rtol)
