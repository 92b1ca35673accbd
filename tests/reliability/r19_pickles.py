"""R19: files that would run code or read other files do neither, wherever a user can put them."""

import base64
import pickle  # noqa: TID251 - to write one
import struct

import httpx
import onnx
import pytest
from pushing import copy_of, new_store
from support import say, serving

from domlora.errors import BundleError
from domlora.serving.folder import read_facts, seal
from domlora.serving.store import Store

pytestmark = pytest.mark.reliability


class Poison:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_poisoned_adapters(exported, tmp_path):
    poison = pickle.dumps(Poison(tmp_path / "ran"))
    header = b'{"__metadata__":{"domlora":"' + base64.b64encode(poison) + b'"}}'
    bodies = [poison, b"PK\3\4" + poison, struct.pack("<Q", len(header)) + header + poison, b"\x80\x04" + bytes(64)]
    store = new_store(exported, tmp_path / "live")
    with serving(store.folder, tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=10) as client:
        for body in bodies:
            assert client.put("/v1/adapters/toys", content=body).status_code == 400
            files = {"file:1/model.pt": base64.b64encode(body).decode()}
            told = client.post("/v2/repository/models/live.toys/load", json={"parameters": files})
            assert told.status_code == 400
        starts = server.counts()["domlora_worker_starts_total"]
    say(f"{2 * len(bodies)} poisoned bodies refused, none ran")
    assert not (tmp_path / "ran").exists()
    assert starts == 1


@pytest.mark.parametrize("location", ["../../secret.bin", "/etc/passwd", "link.bin"])
def test_graphs_that_point_out_of_their_folder(exported, tmp_path, location):
    """Honestly sealed, so that the sha256 are right: whoever writes an export may lie."""
    (tmp_path / "secret.bin").write_bytes(bytes(40_000_000))
    place = copy_of(exported, tmp_path / "a" / "export")
    if location == "link.bin":
        (place / location).symlink_to(tmp_path / "secret.bin")
    for name in ("mixed.onnx", "one.onnx"):
        graph = onnx.load(place / name, load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        (place / name).write_bytes(graph.SerializeToString())
    facts = {key: value for key, value in read_facts(place).items() if key not in ("files", "format")}
    seal(place, facts)
    store = Store.create(tmp_path / "store")
    with pytest.raises(BundleError):
        store.add_version(place)
    assert store.versions() == []
