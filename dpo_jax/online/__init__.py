"""Training on answers that the policy gives while it is trained: PPO, GRPO and
online DPO. See docs/online.md."""

from dpo_jax.online.run import OnlineRun, make_run

__all__ = ["OnlineRun", "make_run"]
