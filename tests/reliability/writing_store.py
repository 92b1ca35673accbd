"""A writer that never stops: pushes adapters, adds versions, makes them live; says on standard output what is done.

``python writing_store.py STORE EXPORTED ADAPTERS SEED``: ``ADAPTERS`` holds files to push, ``EXPORTED`` folders to add.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from domlora.serving.store import Store


def main(folder: Path, exported: Path, adapters: Path, start: int) -> None:
    store = Store.open(folder)
    payloads = {path.stem: path.read_bytes() for path in sorted(adapters.iterdir())}
    names, places = sorted(payloads), sorted(exported.iterdir())
    for step in itertools.count(start):
        if step % 3:
            name = names[step % len(names)]
            _say("begin", *name.split("@"))
            store.put_adapter(name.partition("@")[0], payloads[name])
            _say("done", *name.split("@"))
            continue
        number = 2 + step // 3 % 5
        _say("begin", "live", number)
        if number in store.versions():  # else nothing is new after a while
            store.drop_version(number)
        store.set_live(store.add_version(places[step // 3 % len(places)], number))
        _say("done", "live", number)


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
