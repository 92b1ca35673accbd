import pytest

from domlora.data.plan import Split
from domlora.errors import ConfigError

VALUES = {"train": ("a",), "test": ("b",)}


def test_a_split_by_column_need_not_be_named():
    assert Split(column="part", values=VALUES).kind == "column"
    assert Split().kind == "random"


def test_a_named_kind_overrules_the_column_of_a_preset():
    assert Split("random", column="part", values=VALUES) == Split("random")


def test_a_split_by_column_needs_one():
    with pytest.raises(ConfigError, match=r"needs split\.column"):
        Split("column")
