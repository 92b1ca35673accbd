"""LaTeX of small studies: sound, escaped, and with its marks where they belong."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.studies.reporting.arms import Arms
from domlora.studies.reporting.latex import plain_latex, to_latex
from domlora.studies.reporting.tables import tabulate

SPECIAL = set("#$%&_{}~^\\")


def line(model: str, method: str, seed: int, wauc: float, **more: Any) -> dict[str, Any]:
    domains = [{"name": "50_% & more", "rows": 5, "click_rate": 0.2, "auc": wauc, "status": "scored"}]
    counts = {"params_total": 100, "params_tables": 60, "params_adapters": 0}
    return {"dataset": "toy", "model": model, "method": method, "seed": seed, "wauc": wauc} | {
        "domains": domains,
        **counts,
        **more,
    }


def study(num_methods: int = 1, num_models: int = 2, **more: Any) -> list[dict[str, Any]]:
    """Every method gains a point over the base of the first model, and nothing sure over that of the second."""
    lines = []
    for model in range(num_models):
        for seed in range(1, 6):
            lines.append(line(f"model_{model}", "base", seed, 0.7, **more))
            gain = 0.01 + seed * 1e-5 if model == 0 else 0.01 * (-1) ** seed
            names = [f"two_stage{number}" for number in range(num_methods)]
            lines += [line(f"model_{model}", name, seed, 0.7 + gain, **more) for name in names]
    return lines


def tables_of(text: str) -> list[str]:
    return re.findall(r"\\begin\{table\}.*?\\end\{table\}", text, flags=re.DOTALL)


@pytest.fixture(params=[1, 2, 7], ids=["one method", "two methods", "a line a method"])
def text(request) -> str:
    return to_latex(tabulate(study(request.param, truth=None)))


def test_every_row_has_as_many_cells_as_there_are_columns(text):
    for table in tables_of(text):
        spec = re.search(r"\\begin\{tabular\}\{@\{\}(.*)@\{\}\}", table)
        assert spec is not None
        columns = len(re.sub(r"p\{5cm\}", "p", spec[1]))
        rows = [row for row in table.splitlines() if row.endswith(r"\\")]
        assert rows
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == columns - 1, row


def test_braces_environments_and_maths_close(text):
    body = "\n".join(row for row in text.splitlines() if not row.startswith("%"))
    plain = re.sub(r"\\[{}$%]", "", body)
    assert plain.count("{") == plain.count("}")
    for row in plain.splitlines():
        assert row.count("$") % 2 == 0, row
    assert re.findall(r"\\begin\{(\w+)\}", body).count("table") == body.count(r"\end{table}")
    for rule in ("toprule", "midrule", "bottomrule"):
        assert body.count("\\" + rule) == len(tables_of(text))


def test_labels_differ(text):
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(labels) == len(set(labels)) > 0


def test_marks_say_what_is_sure_and_what_stays():
    text = to_latex(tabulate(study()))
    assert (
        r"model\_0 & $70.00$ $\pm$ $0.00$ & $71.00$ $\pm$ $0.00$ & $+1.00$ [$+1.00$, $+1.00$]$^{\ast\dagger}$ \\"
        in text
    )
    (unsure,) = [row for row in text.splitlines() if row.startswith(r"model\_1 & $70.00$ $\pm$ $0.00$ & $69.80$")]
    assert r"\ast" not in unsure
    assert "[$-1.56$, $+1.16$]" in unsure


def test_switches_are_a_table_of_their_own():
    arms = Arms(steps=("two_stage0", "two_stage1"), titles={"two_stage0": "+ 50 % of_it"})
    text = to_latex(tabulate(study(2)), arms)
    assert r"\caption{What each switch moves on toy." in text
    assert r"+ 50 \% of\_it" in text


def test_tables_that_no_page_holds_are_cut():
    text = to_latex(tabulate(study(2, num_models=60)))
    mains = [table for table in tables_of(text) if r"\caption{WAUC, toy" in table]
    assert len(mains) == 2
    rows = [sum(row.endswith(r"\\") for row in table.splitlines()) - 1 for table in mains]
    assert rows == [45, 61 - 45]  # and the mean over models


@given(st.text(max_size=40))
def test_no_name_is_a_command(name):
    text = plain_latex(name)
    assert "\n" not in text
    rest = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}", "", text)
    rest = re.sub(r"\$(-|\\pm|\\dagger|\\times)\$", "", rest)
    rest = re.sub(r"\\[#$%&_{}]", "", rest)
    assert not SPECIAL & set(rest)
