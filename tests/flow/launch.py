"""Programs started in one process, or by torchrun on ranks of this machine, and how far their weights lie apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

__all__ = ["distance", "kill_one", "run"]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def torchrun(size: int, *words: str) -> list[str]:
    options = ["--standalone", "--nproc-per-node", str(size), "--max-restarts", "2", "--monitor-interval", "0.5"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *words]


def run(size: int, *words: str) -> None:
    command = [sys.executable, *words] if size == 1 else torchrun(size, *words)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def kill_one(size: int, checkpoint: Path, *words: str) -> float:
    """Kill the second rank when a checkpoint is there; seconds from then to the end of the run, which must end well."""
    with subprocess.Popen(
        torchrun(size, *words), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        patience = time.monotonic() + 120
        while not (checkpoint / "checkpoint.json").exists() and time.monotonic() < patience:
            time.sleep(0.05)
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        assert process.stderr is not None
        told = process.stderr.read().decode()
        assert process.wait() == 0, told[-3000:]
        return time.monotonic() - killed


def workers_of(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found if b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def distance(one: Path, two: Path) -> float:
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
