from __future__ import annotations

import pytest

from domlora.data.preparing.labels import LabelRule, zero_or_one
from domlora.errors import ConfigError


@pytest.mark.parametrize(
    ("rule", "rating", "label"),
    [
        ("== 5", 5, 1),
        ("==5", "5.0", 1),
        ("!= 5", 5, 0),
        (">= 4", 4, 1),
        (">=3.5", 3.4, 0),
        ("< -1", -2, 1),
        ("> 0", "  2 ", 1),
        ("<= 0", True, 0),
    ],
)
def test_rules(rule: str, rating: object, label: int) -> None:
    assert LabelRule.parse(rule)(rating) == label


@pytest.mark.parametrize("rating", [None, "", "?", float("nan"), float("inf"), "five"])
def test_what_is_no_number_has_no_label(rating: object) -> None:
    assert LabelRule.parse(">= 4")(rating) is None


@pytest.mark.parametrize("text", ["", "5", "= 5", "rating == 5", ">= x", ">= 4 5", "≥ 4", ">= ٤"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="OP number"):
        LabelRule.parse(text)


@pytest.mark.parametrize("value", [2, -1, 0.5, "yes", "", None, float("nan")])
def test_without_a_rule_a_label_is_0_or_1(value: object) -> None:
    assert zero_or_one(value) is None
