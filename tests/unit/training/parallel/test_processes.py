"""Processes that may die."""

from __future__ import annotations

import math
import os
from functools import partial
from operator import call
from typing import Any

import pytest

from domlora.errors import ConfigError, EngineError
from domlora.training.parallel.processes import in_workers


def test_every_task_gets_its_result_however_many_workers() -> None:
    tasks = list(range(12))
    for workers in (1, 3):
        assert sorted(in_workers(math.factorial, tasks, workers=workers)) == [(n, math.factorial(n)) for n in tasks]
    assert list(in_workers(math.factorial, [], workers=2)) == []


def test_a_task_that_kills_its_workers_is_given_up_and_all_others_end() -> None:
    tasks: list[Any] = [
        partial(math.sqrt, 4.0),
        partial(os._exit, 1),
        *(partial(math.sqrt, n) for n in (9.0, 16.0, 25.0)),
    ]
    found = {task.args[0]: result for task, result in in_workers(call, tasks, workers=2, tries=2)}
    assert found == {4.0: 2.0, 1: None, 9.0: 3.0, 16.0: 4.0, 25.0: 5.0}


def test_a_task_whose_worker_died_is_tried_again_in_another(tmp_path: Any) -> None:
    """``mkdir`` fails the second time: the first worker dies after it, the next one finds it done."""
    place = tmp_path / "seen"
    script = f"import os\nif os.path.exists({str(place)!r}): raise LookupError\nos.mkdir({str(place)!r})\nos._exit(9)"
    with pytest.raises(LookupError):
        list(in_workers(call, [partial(exec, script)], workers=1))
    assert place.is_dir()


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="math domain"):
        list(in_workers(math.sqrt, [4.0, -1.0, 9.0], workers=2))
    with pytest.raises(ConfigError, match="at least 1"):
        list(in_workers(math.sqrt, [4.0], workers=0))


def test_a_study_says_so_when_a_process_dies() -> None:
    from domlora.studies.processes import in_processes

    with pytest.raises(EngineError, match="must live"):
        list(in_processes(os._exit, [3, 4], 2))
