"""Machines: network namespaces on one bridge, a server in each, and a balancer before them with the files of ``deploy/``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from support import REAL, ROOT, START

BRIDGE, NET, PORT = "domlora-br", "10.213.97", 8000
BALANCED = 18080
CONFIGS = {"nginx": ROOT / "deploy/nginx/nginx.conf", "haproxy": ROOT / "deploy/haproxy/haproxy.cfg"}


def missing() -> str:
    """What this machine lacks, empty if nothing."""
    if os.geteuid():
        return "needs root"
    lacking = [name for name in ("ip", *CONFIGS) if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: apt-get install iproute2 nginx-light haproxy)"
    made = subprocess.run(["ip", "netns", "add", "domlora-try"], capture_output=True, check=False)
    if made.returncode:
        return "no network namespace can be made here"
    run("ip netns del domlora-try")
    return ""


def run(line: str) -> str:
    return subprocess.run(line.split(), check=True, capture_output=True, text=True).stdout


@contextmanager
def network(count: int) -> Iterator[None]:
    """A bridge with this machine on it, and so many namespaces beside it."""
    remove(count)
    run(f"ip link add {BRIDGE} type bridge")
    run(f"ip addr add {NET}.1/24 dev {BRIDGE}")
    run(f"ip link set {BRIDGE} up")
    try:
        for number in range(1, count + 1):
            space = f"domlora-{number}"
            run(f"ip netns add {space}")
            run(f"ip link add {space} type veth peer name eth0 netns {space}")
            run(f"ip link set {space} master {BRIDGE} up")
            run(f"ip -n {space} addr add {NET}.{number + 10}/24 dev eth0")
            run(f"ip -n {space} link set eth0 up")
            run(f"ip -n {space} link set lo up")
        yield
    finally:
        remove(count)


def remove(count: int) -> None:
    for line in [f"ip netns del domlora-{n}" for n in range(1, count + 1)] + [f"ip link del {BRIDGE}"]:
        subprocess.run(line.split(), capture_output=True, check=False)


class Replica:
    """A server in a namespace; its copy of the shared store is in a folder of its own."""

    def __init__(self, number: int, url: str, folder: Path) -> None:
        self.number, self.folder = number, folder / f"replica-{number}"
        self.url = f"http://{NET}.{number + 10}:{PORT}"
        self._store_url = url
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        told = {
            "bundle": str(self.folder),
            "name": "live",
            "host": "0.0.0.0",
            "port": PORT,
            "store_url": self._store_url,
            "max_wait_s": 5.0,  # a busy machine may refuse a request now and then; lost is another thing
            "drain_s": 2.0,
        }
        line = ["ip", "netns", "exec", f"domlora-{self.number}", sys.executable, "-c", START, json.dumps(told), REAL]
        path = f"{ROOT / 'src'}:{ROOT / 'tests/reliability'}"
        with self.folder.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(line, stderr=log, env={**os.environ, "PYTHONPATH": path})

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/health/ready", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """All of its processes at once, as when a machine stops."""
        for pid in run(f"ip netns pids domlora-{self.number}").split():
            os.kill(int(pid), signal.SIGKILL)
        assert self.process is not None
        self.process.wait(10)

    def unplug(self) -> None:
        """No packet comes or goes any more, and nobody is told."""
        run(f"ip link set domlora-{self.number} down")

    def plug(self) -> None:
        run(f"ip link set domlora-{self.number} up")

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=5).text
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


@contextmanager
def replicas(count: int, url: str, folder: Path) -> Iterator[list[Replica]]:
    with network(count):
        found = [Replica(number, url, folder) for number in range(1, count + 1)]
        try:
            for replica in found:
                replica.start()
            wait_for(lambda: all(replica.ready() for replica in found), 120)
            yield found
        finally:
            for replica in found:
                replica.kill()


@contextmanager
def balancer(name: str, folder: Path) -> Iterator[int]:
    """The example of ``deploy/``, with the addresses of these machines."""
    text = re.sub(r"replica-(\d):8000", lambda found: f"{NET}.{int(found[1]) + 10}:{PORT}", CONFIGS[name].read_text())
    text = text.replace("8080", f"127.0.0.1:{BALANCED}" if name == "nginx" else str(BALANCED)).replace(
        "bind :", "bind 127.0.0.1:"
    )
    text = text.replace("/run/nginx.pid", str(folder / "nginx.pid"))
    config = folder / CONFIGS[name].name
    config.write_text(text)
    line = ["nginx", "-c", str(config), "-g", "daemon off;"] if name == "nginx" else ["haproxy", "-f", str(config)]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{BALANCED}/v2/health/ready").status_code == 200, 20)
        yield BALANCED
    finally:
        process.terminate()
        process.wait(10)


def wait_for(seen: Any, timeout_s: float) -> float:
    """How many seconds it took."""
    start = time.perf_counter()
    while True:
        try:
            if seen():
                return time.perf_counter() - start
        except httpx.HTTPError:
            pass
        assert time.perf_counter() - start < timeout_s
        time.sleep(0.01)
