"""R11: six kinds of damage at the start: named and not served; the process lives, and is ready once it is repaired."""

import shutil
import time

import pytest
from pushing import copy_of
from support import limit, say, serving

from domlora.serving.store import Store

pytestmark = pytest.mark.reliability
TABLES = "tables.bin"


def _flip(place):
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)


def _zero_page(place):
    content = place.read_bytes()
    place.write_bytes(bytes(4096) + content[4096:])


DAMAGES = {
    "truncated": (TABLES, lambda place: place.write_bytes(place.read_bytes()[:-1])),
    "empty": ("mixed.onnx", lambda place: place.write_bytes(b"")),
    "bit flip": (TABLES, _flip),
    "zero page": (TABLES, _zero_page),
    "swapped": ("one.onnx", lambda place: shutil.copyfile(place.with_name("mixed.onnx"), place)),
    "missing": ("adapters/00001.safetensors", lambda place: place.unlink()),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_corrupt_start(exported, tmp_path, kind):
    name, damage = DAMAGES[kind]
    store = Store.create(tmp_path / "live")
    store.add_version(copy_of(exported, tmp_path / "export"))
    place = store.version_folder(1) / name
    whole = place.read_bytes()
    damage(place)
    start = time.perf_counter()
    with serving(store.folder, tmp_path / "log", ready=False) as server:
        server.wait(lambda: name in server.get("/v2/health/ready").text, 30)
        seconds = time.perf_counter() - start
        told = server.get("/v2/health/ready")
        assert (told.status_code, server.get("/v2/health/live").status_code) == (503, 200)
        assert str(tmp_path) not in told.text
        assert server.get("/v2/models/live").status_code == 503
        place.write_bytes(whole)
        server.wait(lambda: server.get("/v2/health/ready").status_code == 200, 20)
    say(f"{kind}: refused after {seconds:.1f} s by the name of {name}")
    assert seconds < limit(5, 20)
