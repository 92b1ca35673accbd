"""A real Redis or Valkey on a socket of its own, and two versions of a model whose tables it holds."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from domlora.features.batch import Batch
from domlora.serving.export import export
from domlora.serving.program import Program
from domlora.serving.rows.folder import RowsFolder, write_rows
from domlora.serving.rows.layout import RemoteTable

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")


class Server:
    """A server that a test may stop and start again; it forgets all then."""

    def __init__(self, folder: Path) -> None:
        import redis

        self._socket, self.url = folder / "socket", f"unix://{folder / 'socket'}"
        self.client = redis.Redis.from_url(self.url)
        self._failure = redis.RedisError
        self.start()

    def start(self) -> None:
        told = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([str(SERVER), *told], stdout=subprocess.DEVNULL)
        for _ in range(500):
            with suppress(self._failure):
                self.client.ping()
                return
            time.sleep(0.01)
        raise AssertionError("the server did not start")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def running() -> Iterator[Server]:
    pytest.importorskip("redis")
    if SERVER is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    with tempfile.TemporaryDirectory(prefix="dr") as folder:  # a socket's path must be short
        server = Server(Path(folder))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def server(running: Server) -> Server:
    """Empty, and with room for all."""
    running.client.flushall()
    running.client.config_set("maxmemory", 0)
    running.client.config_set("maxmemory-policy", "noeviction")
    return running


class Version(NamedTuple):
    """An export without its tables, and the same model with them."""

    folder: Path
    whole: Program


class Versions(NamedTuple):
    """A model and what became of it: five words and a domain more, and other vectors for some words."""

    old: Version
    new: Version


@pytest.fixture(scope="session")
def versions(adapted: Any, next_day: Any, tmp_path_factory: pytest.TempPathFactory, sample: Batch) -> Versions:
    made = []
    for number, each in enumerate((adapted, next_day)):
        folder = tmp_path_factory.mktemp("remote") / f"v{number + 1}"
        export(each.bundle, folder, [sample], remote_tables=["embedding.*"])
        made.append(Version(folder, Program.open(each.folder)))
    return Versions(*made)


@pytest.fixture(scope="session")
def sample() -> Batch:
    import torch

    ids = torch.stack([torch.randint(0, size, (50,)) for size in (600, 600, 600, 600, 6)], 1)
    return Batch(ids, torch.randn(50, 1), torch.arange(50) % 3, torch.zeros(50))


@pytest.fixture
def arrays(rows: Callable[..., Batch]) -> tuple[Any, ...]:
    batch = rows(200, 5)
    return batch.ids.numpy(), batch.dense.numpy(), batch.domain.numpy()


class _Table(NamedTuple):
    table: RemoteTable
    content: np.ndarray

    def rows(self, numbers: slice) -> np.ndarray:
        return self.content[numbers]


@pytest.fixture
def rows_folder(tmp_path: Path) -> Callable[[np.ndarray], RowsFolder]:
    """A folder of rows of one table, of numbers that a test chooses."""

    def make(content: np.ndarray) -> RowsFolder:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        content = np.ascontiguousarray(content, np.float32)
        write_rows([_Table(RemoteTable("t", len(content), {"t": content.shape[1]}, ["t.at0"]), content)], folder)
        return RowsFolder(folder)

    return make
