from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from domlora.data.ahead import ahead


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("domlora-ahead")]


def none_left() -> bool:
    """A worker ends once its last item is made."""
    for _ in range(200):
        if not workers():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_same_items(depth: int) -> None:
    assert list(ahead(iter(range(20)), depth)) == list(range(20))
    assert list(ahead(iter([None, 0, []]), depth)) == [None, 0, []]
    assert list(ahead(iter(()), depth)) == []
    assert none_left()


def test_no_more_than_depth_are_made_in_advance() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    reader = ahead(items(), depth=3)
    assert not made  # nothing happens before the first is asked for
    for asked in range(1, 5):
        next(reader)
        time.sleep(0.02)
        assert asked <= len(made) <= asked + 3
    reader.close()
    assert none_left()


def test_items_are_made_while_the_reader_works() -> None:
    ready = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        ready.set()
        yield 2

    reader = ahead(items(), depth=1)
    assert next(reader) == 1
    assert ready.wait(5)
    assert list(reader) == [2]


def test_an_error_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise ValueError("broken")

    reader = ahead(items(), depth=4)
    assert [next(reader), next(reader)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(reader)
    assert list(reader) == []
    assert none_left()


def test_a_reader_that_stops_leaves_no_thread() -> None:
    endless = iter(int, 1)
    closed, dropped = ahead(endless, 2), ahead(endless, 2)
    for reader in (closed, dropped):
        next(reader)
    assert len(workers()) == 2
    closed.close()
    del dropped, reader
    gc.collect()
    assert none_left()


def test_a_reader_in_a_cycle_of_references_leaves_no_thread() -> None:
    class Holder:
        def __init__(self) -> None:
            self.reader, self.me = ahead(iter(int, 1), 2), self
            next(self.reader)

    Holder()
    gc.collect()
    assert none_left()


def test_a_reader_that_fails_leaves_no_thread() -> None:
    def read() -> None:
        for _ in ahead(iter(int, 1), 2):
            raise KeyError

    with pytest.raises(KeyError):
        read()
    gc.collect()
    assert none_left()
