"""A SLURM of one node on this machine, with its own keys, ports and files."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

from dpo_jax.sweep import with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={place}/munge.sock
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
  """Why there can be no SLURM here; "" if there can."""
  lacking = [name for name in PROGRAMS if not shutil.which(name)]
  if lacking:
    return f"not installed: {', '.join(lacking)} (Debian: slurmctld, slurmd)"
  return "" if os.geteuid() == 0 else "its daemons want to be root"


class Slurm:
  """`with Slurm(path) as slurm:` has two partitions, low and high. The second
  takes the node of the first, which has a minute to save."""

  def __init__(self, place: pathlib.Path):
    self.place = place
    self.environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf")}
    self._daemons: list[subprocess.Popen] = []

  def __enter__(self) -> "Slurm":
    place, host = self.place, socket.gethostname().partition(".")[0]
    for folder in ("state", "spool"):
      (place / folder).mkdir(parents=True)
    with contextlib.ExitStack() as held:
      sockets = [held.enter_context(socket.socket()) for _ in range(2)]
      for one in sockets:
        one.bind(("127.0.0.1", 0))
      ports = [one.getsockname()[1] for one in sockets]
    conf = _CONF.format(place=place, host=host, ports=ports)
    (place / "slurm.conf").write_text(conf)
    key = place / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    self._start(
      "munged", "--force", "--foreground", f"--key-file={key}",
      f"--socket={place}/munge.sock", f"--pid-file={place}/munged.pid",
      f"--log-file={place}/munged.log", f"--seed-file={place}/munged.seed",
    )  # fmt: skip
    self.wait_for((place / "munge.sock").exists)
    self._start("slurmctld", "-D", "-c")
    self._start("slurmd", "-D")
    self.wait_for(lambda: "idle" in self.call("sinfo", "-h", "-o", "%t"))
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.call("scancel", "--user=root", "--signal=KILL", "--full")
    self.call("scancel", "--user=root")
    with contextlib.suppress(AssertionError):
      self.wait_for(lambda: not self.states(), 15)
    for daemon in reversed(self._daemons):
      daemon.terminate()
    for daemon in self._daemons:
      daemon.wait(30)

  def call(self, *command: str) -> str:
    """What a command prints; "" if it fails."""
    done = subprocess.run(
      command, env=self.environment, capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else ""

  def states(self) -> dict[str, str]:
    """Of all jobs that have not ended, by "job" or "job_task"."""
    lines = self.call("squeue", "-h", "-r", "-o", "%i %T").splitlines()
    return dict(line.split() for line in lines)

  def hurry(self) -> None:
    """Lets jobs that were requeued start now; SLURM waits two minutes."""
    for job, state in self.states().items():
      if state == "PENDING":
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now")

  def wait_for(self, condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < deadline, f"in vain: {self.states()}"
      time.sleep(0.2)

  def _start(self, *command: str) -> None:
    log = (self.place / f"{command[0]}.out").open("w")
    watched = [sys.executable, "-I", with_parent.__file__, str(os.getpid())]
    self._daemons.append(
      subprocess.Popen(
        [*watched, *command], env=self.environment, stdout=log, stderr=log
      )
    )
    log.close()
