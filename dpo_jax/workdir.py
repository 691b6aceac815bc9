"""The directory of a run: what lies in it, and whose it is."""

import contextlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax import processes
from dpo_jax.config import Config, differences, without
from dpo_jax.errors import ConfigError
from dpo_jax.files import write_whole
from dpo_jax.lock import Lock
from dpo_jax.report import write_report
from dpo_jax.stored import saved_steps
from dpo_jax.writers import views


class Workdir:
  """Paths of a run's files.

  config.json     every setting
  metrics.jsonl   one row per logged step and per evaluation
  skipped.jsonl   steps whose update was not finite, and their rows of the data
  checkpoints/    orbax; what a stopped run continues from
  samples.jsonl   answers before and after
  summary.json    what came out, with counts of dropped data; written last
  report.html     the same to look at
  model/          the trained model as a Hugging Face folder
  adapter/        with LoRA, the adapters alone in PEFT's format
  stacks-N.txt    of process N, where it hung
  trace/          the profile of chosen steps
  tensorboard/, wandb_id.txt  of the views of metrics.jsonl, where asked for
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).expanduser().absolute()
    self.config = self.path / "config.json"
    self.checkpoints = self.path / "checkpoints"
    self.metrics = self.path / "metrics.jsonl"
    self.samples = self.path / "samples.jsonl"
    self.skipped = self.path / "skipped.jsonl"
    self.summary = self.path / "summary.json"
    self.report = self.path / "report.html"
    self.model = self.path / "model"
    self.adapter = self.path / "adapter"
    self.trace = self.path / "trace"

  def check(self, config: Config, allow: Sequence[str] = ()) -> None:
    """Refuses what cannot become this run's directory; writes nothing.

    Args:
      config: of the run.
      allow: settings, or whole sections, in which what is there may differ.

    Raises:
      ConfigError: it cannot be written, or holds another run.
    """
    if self.config.exists():
      other = self._differences(config, allow)
      if other and self._begun():
        raise ConfigError(
          f"work directory {self.path} holds another run ({other}); take"
          " another directory, or the same settings to continue (--allow=NAME"
          " lets a setting change)"
        )
    there = next(p for p in (self.path, *self.path.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
      raise ConfigError(
        f"work directory {self.path}: {there} is not a writable directory"
      )

  @contextlib.contextmanager
  def claimed(
    self, config: Config, allow: Sequence[str] = ()
  ) -> Iterator[None]:
    """Makes the directory this run's, and this run the only one in it. What
    an attempt left that never came to a checkpoint is removed, for the data or
    the model may be others now. All processes of the run enter.

    Raises:
      ConfigError: it cannot be written, holds another run, a run is going on
        in it, or another process of this one does not see it.
    """
    lock = Lock(self.path)

    def claim():
      self.check(config, allow)
      try:
        self.path.mkdir(parents=True, exist_ok=True)
        lock.take()
        self._begin(config, allow)
        return lock.path.read_text()
      except OSError as e:
        raise ConfigError(
          f"work directory {self.path}: {e.strerror or e}"
        ) from e

    try:
      owner = processes.lead(claim)
      if not processes.all_agree(_appears(lock.path, owner)):
        raise ConfigError(
          f"work directory {self.path}: not all processes of the run see it;"
          " it should lie on a file system that all hosts share"
        )
      yield
    finally:
      lock.release()

  def _begin(self, config: Config, allow: Sequence[str]) -> None:
    self.check(config, allow)  # it may have become another's in between
    if not self._begun():
      for left in (self.samples, self.metrics, self.skipped, *views(self.path)):
        if left.is_dir():
          shutil.rmtree(left)
        else:
          left.unlink(missing_ok=True)
    mine = {"config": config.to_dict(), "identity": config.identity()}
    text = json.dumps(mine, indent=2, default=str) + "\n"
    if not self.config.exists() or self.config.read_text() != text:
      write_whole(self.config, text)

  def write_json(self, path: pathlib.Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, default=str) + "\n")

  def write_jsonl(self, path: pathlib.Path, rows: list[dict]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

  def forget_skipped(self, step: int) -> None:
    """Leaves out of skipped.jsonl what comes after a step, to come again."""
    if self.skipped.exists():
      rows = []
      for line in self.skipped.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a last one that was cut
          rows.append(json.loads(line))
      self.write_jsonl(self.skipped, [r for r in rows if r["step"] <= step])

  def read_samples(self) -> list[dict] | None:
    """Rows of samples.jsonl, or None."""
    if not self.samples.exists():
      return None
    lines = self.samples.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

  def _differences(self, config: Config, allow: Sequence[str]) -> str:
    saved = self._read(self.config)
    if not isinstance(saved, dict) or "identity" not in saved:
      raise ConfigError(
        f"work directory {self.path} holds a config.json that is not of a"
        " run; take another directory"
      )
    return differences(
      without(saved["identity"], allow), without(config.identity(), allow)
    )

  def _begun(self) -> bool:
    """Whether there is anything to continue or to lose."""
    return bool(saved_steps(self.checkpoints)) or self.summary.exists()

  def read_results(self) -> dict[str, Any]:
    """The summary; makes a report of it where none is there."""
    if not self.report.exists():
      write_report(self.path)
    return self.read_summary()

  def read_summary(self) -> dict[str, Any]:
    return self._read(self.summary)

  def _read(self, path: pathlib.Path) -> Any:
    try:
      return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
      raise ConfigError(f"{path}: cannot be read: {e}") from e


def _appears(path: pathlib.Path, text: str, seconds: float = 10.0) -> bool:
  """Whether a file with that text is there, or soon is: shared file systems may
  lag."""
  ends = time.monotonic() + seconds
  while not path.exists() or path.read_text() != text:
    if time.monotonic() > ends:
      return False
    time.sleep(0.1)
  return True
