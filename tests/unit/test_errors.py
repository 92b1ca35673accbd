from __future__ import annotations

import copy
import inspect

import pytest

from domlora import errors
from domlora.errors import ConfigError, DomloraError, nearest

TREE = {
    "ConfigError": ValueError,
    "SchemaError": ValueError,
    "DataError": ValueError,
    "UnknownDomainError": LookupError,
    "BundleError": ValueError,
    "EngineError": RuntimeError,
}


def test_three_parts_in_order() -> None:
    error = ConfigError("p must be below 1", received=1.5, next_step="Choose a smaller one")
    assert str(error) == "p must be below 1. Received: 1.5. Choose a smaller one."


@pytest.mark.parametrize("value", [None, 0, "", [], float("nan")])
def test_values_that_look_like_nothing_are_shown(value: object) -> None:
    assert f"Received: {value!r}." in str(ConfigError("a rule", received=value))


def test_without_a_value_and_without_a_step_only_the_rule_is_left() -> None:
    assert str(DomloraError("a rule")) == "a rule."


@pytest.mark.parametrize("step", ["Do it.", "Did you mean 'x'?"])
def test_a_step_that_ends_a_sentence_gets_no_second_full_stop(step: str) -> None:
    assert str(DomloraError("a rule", next_step=step)).endswith(step)


@pytest.mark.parametrize(("name", "kind"), TREE.items())
def test_every_error_is_ours_and_what_python_would_raise(name: str, kind: type[Exception]) -> None:
    error = getattr(errors, name)
    assert issubclass(error, DomloraError)
    assert issubclass(error, kind)


def test_the_tree_is_drawn_and_complete() -> None:
    classes = [
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, DomloraError)
    ]
    assert set(classes) == {"DomloraError", *TREE}
    assert errors.__doc__ is not None
    for name in classes:
        assert name in errors.__doc__


def test_a_copy_says_the_same() -> None:
    """Copies are made the way errors travel between processes."""
    error = ConfigError("a rule", received=3, next_step="Do it")
    assert str(copy.copy(error)) == str(error)
    assert type(copy.copy(error)) is ConfigError


def test_nearest_guesses_and_lists() -> None:
    assert nearest("depfm", ["dcn", "deepfm"]) == "Did you mean 'deepfm'? Known: 'dcn', 'deepfm'."


def test_nearest_does_not_guess_wildly() -> None:
    assert nearest("zzz", ["dcn", "deepfm"]) == "Known: 'dcn', 'deepfm'."


def test_nearest_does_not_list_hundreds() -> None:
    said = nearest("n7", (f"n{number}" for number in range(500)))
    assert said.startswith("Did you mean 'n7'?")
    assert said.count("'n") <= 32
    assert said.endswith(", ....")


def test_nearest_of_nothing_says_so() -> None:
    assert "none" in nearest("x", []).lower()
