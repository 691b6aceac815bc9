"""One self-contained page per run: what changed, how, on what data."""

from dpo_jax.report.page import write_report

__all__ = ["write_report"]
