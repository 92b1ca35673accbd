"""Small result lines whose tables were worked out by hand."""

from __future__ import annotations

import json
import math
from itertools import permutations
from typing import Any

import pytest

from domlora.errors import DataError
from domlora.studies.reporting.cells import Cell
from domlora.studies.reporting.findings import families
from domlora.studies.reporting.statistics import p_value, paired, spread
from domlora.studies.reporting.tables import MEAN, DomainRow, read_results, shown_domains, tabulate
from domlora.studies.reporting.text import to_csv, to_markdown


def line(model="mlp", method="base", seed=1, wauc=0.75, dataset="toy", **more) -> dict[str, Any]:
    adapters = 0 if method in ("base", "truth") else 20
    return {
        "study": "demo",
        "dataset": dataset,
        "model": model,
        "method": method,
        "seed": seed,
        "key": f"{dataset}/{model}/{method}/{seed}",
        "config_hash": "c0ffee",
        "data_fingerprint": "f1",
        "wauc": wauc,
        "params_total": 100 + adapters,
        "params_tables": 60,
        "params_adapters": adapters,
        **more,
    }


def domain(name, rows, auc, click_rate=0.25, status="scored") -> dict[str, Any]:
    return {"name": name, "rows": rows, "click_rate": click_rate, "auc": auc, "status": status}


def two_models() -> list[dict[str, Any]]:
    """Differences of mlp: 0.01, 0.02, 0.03; of dcn: 0.03, 0.02, 0.01; their mean is 0.02 for every seed."""
    lines = []
    for seed, (one, other) in enumerate([(0.01, 0.03), (0.02, 0.02), (0.03, 0.01)], 1):
        lines += [line("mlp", "base", seed, 0.70), line("mlp", "two_stage", seed, 0.70 + one)]
        lines += [line("dcn", "base", seed, 0.80), line("dcn", "two_stage", seed, 0.80 + other)]
    return lines


def cells_of(row):
    return {cell.method: cell for cell in row.cells}


# ------------------------------------------------------------------------------------------------------------ files


def test_read_keeps_the_newest_line_of_a_key(tmp_path):
    path = tmp_path / "results.jsonl"
    lines = [{"key": "a", "wauc": 0.1}, {"key": "b", "wauc": 0.2}, {"key": "a", "wauc": 0.3}]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert {each["key"]: each["wauc"] for each in read_results(path)} == {"a": 0.3, "b": 0.2}


def test_read_leaves_out_what_was_cut(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = json.dumps(line(dataset="é"), ensure_ascii=False).encode()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + b"\n" + whole[:cut])
        assert read_results(path) == [json.loads(whole)]
    path.write_bytes(whole[:50] + b"\n\n" + whole + b"\n")  # the study ends a cut line and goes on behind it
    assert read_results(path) == [json.loads(whole)]


def test_read_nothing_of_no_file(tmp_path):
    assert read_results(tmp_path / "results.jsonl") == []


@pytest.mark.parametrize("text", ["[1, 2]", '{"wauc": 0.5}', '{"key": 3}'])
def test_read_refuses_whole_lines_that_are_no_result(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"key": "a"}}\n{text}\n')
    with pytest.raises(DataError, match=r"line 2 of .* must be a JSON object with a key"):
        read_results(path)


# ----------------------------------------------------------------------------------------------------------- tables


def test_differences_are_paired_by_model_and_seed():
    (table,) = tabulate(two_models()).datasets
    assert [row.model for row in table.models] == ["dcn", "mlp"]
    assert table.methods == ("base", "two_stage")
    cell = cells_of(table.models[1])["two_stage"]
    assert cell.difference == pytest.approx(paired([0.01, 0.02, 0.03]))
    assert cell.score.mean == pytest.approx(0.72)
    assert cell.score.std == pytest.approx(0.01)
    assert cells_of(table.models[1])["base"].difference.num_pairs == 0


def test_mean_over_models_is_paired_over_seeds():
    (table,) = tabulate(two_models()).datasets
    assert table.mean is not None
    cell = cells_of(table.mean)["two_stage"]
    assert table.mean.model == MEAN
    assert cell.num_models == 2
    assert cell.score.mean == pytest.approx(0.77)
    assert cell.difference.num_pairs == 3  # seeds, not models times seeds
    assert cell.difference[:3] == pytest.approx((0.02, 0.02, 0.02))


def test_a_mean_over_models_takes_only_seeds_that_all_models_have():
    lines = [each for each in two_models() if (each["model"], each["seed"]) != ("dcn", 3)]
    tables = tabulate(lines)
    mean = tables.datasets[0].mean
    assert mean is not None
    assert cells_of(mean)["two_stage"].difference.num_pairs == 2
    assert cells_of(mean)["base"].score.mean == pytest.approx(0.75)
    assert "2 of 12 runs" in tables.cautions[0]


def test_a_model_without_the_method_is_not_in_its_mean():
    lines = [each for each in two_models() if (each["model"], each["method"]) != ("dcn", "two_stage")]
    mean = tabulate(lines).datasets[0].mean
    assert mean is not None
    cell = cells_of(mean)["two_stage"]
    assert cell.num_models == 1
    assert cell.difference.mean == pytest.approx(0.02)  # against mlp's own base, not against the mean of both bases


def test_tables_do_not_depend_on_the_order_of_the_lines():
    lines = two_models()[:4]
    texts = {(to_csv(tabulate(order)), to_markdown(tabulate(order))) for order in permutations(lines)}
    assert len(texts) == 1


def test_the_later_of_two_equal_runs_counts_and_is_told():
    tables = tabulate([line(wauc=0.6, config_hash="old"), line(wauc=0.7)])
    assert cells_of(tables.datasets[0].models[0])["base"].score.mean == 0.7
    assert tables.cautions[0].startswith("1 older runs")
    assert not tabulate([line(key="old"), line(key="new")]).cautions  # one training under two keys


def test_means_over_few_of_the_models_say_so():
    lines = two_models() + five_seeds("other", WEAK, "joint")
    text = to_markdown(tabulate(lines))
    assert "is over the models of each method: joint 1" in text


def test_runs_on_other_data_are_no_pair():
    lines = [line(), line(method="joint", wauc=0.8, data_fingerprint="f2"), line(seed=2), line("mlp", "joint", 2, 0.76)]
    tables = tabulate(lines)
    difference = cells_of(tables.datasets[0].models[0])["joint"].difference
    assert difference.num_pairs == 1
    assert difference.mean == pytest.approx(0.01)
    assert any("several versions of the data" in caution for caution in tables.cautions)


def test_worlds_of_their_own_for_each_seed_are_no_caution():
    lines = [line(method=m, seed=s, data_fingerprint=f"f{s}") for s in (1, 2) for m in ("base", "joint")]
    assert tabulate(lines).cautions == ()


def test_share_of_the_gap_to_the_truth_of_the_same_data():
    lines = [line(seed=0, model="truth", method="truth", wauc=0.8)]
    for seed, after in ((1, 0.72), (2, 0.74)):
        lines += [line(seed=seed, wauc=0.7), line(method="joint", seed=seed, wauc=after)]
    (table,) = tabulate(lines).datasets
    share = cells_of(table.models[0])["joint"].gap_closed
    assert share == pytest.approx(paired([0.2, 0.4]))
    assert table.truth.mean == 0.8
    assert [row.model for row in table.models] == ["mlp"]  # the truth is no model


def test_each_world_has_its_own_truth():
    lines = []
    for seed, truth in ((1, 0.8), (2, 0.9)):
        own = {"seed": seed, "data_fingerprint": f"f{seed}"}
        lines += [line(**own, wauc=0.7), line(**own, method="joint", wauc=0.75)]
        lines.append(line(**own, model="truth", method="truth", wauc=truth))
    share = cells_of(tabulate(lines).datasets[0].models[0])["joint"].gap_closed
    assert share == pytest.approx(paired([0.5, 0.25]))


def test_no_share_without_a_truth():
    assert cells_of(tabulate(two_models()).datasets[0].models[0])["two_stage"].gap_closed.num_pairs == 0


def test_domains_are_paired_sorted_and_know_one_class():
    lines = []
    for seed, gain in ((1, 0.01), (2, 0.03)):
        one_class = domain("empty", 5, None, 0.0, "one class")
        lines.append(line(seed=seed, domains=[domain("app", 100, 0.7), domain("web", 300, 0.8), one_class]))
        after = [domain("app", 100, 0.7 + gain), domain("web", 300, 0.8), one_class]
        lines.append(line(method="two_stage", seed=seed, domains=after))
    rows = tabulate(lines).datasets[0].domains
    assert [(row.name, row.rows, row.status) for row in rows] == [
        ("web", 300, "scored"),
        ("app", 100, "scored"),
        ("empty", 5, "one class"),
    ]
    assert cells_of(rows[1])["two_stage"].difference == pytest.approx(paired([0.01, 0.03]))
    assert cells_of(rows[2])["two_stage"].score.num_values == 0


def test_methods_with_equal_counts_share_a_row_of_parameters():
    lines = [line(method=method) for method in ("base", "joint", "two_stage")]
    base, adapted = tabulate(lines).datasets[0].parameters
    assert (base.methods, base.total, base.tables, base.dense, base.adapters) == (("base",), 100, 60, 40, 0)
    assert (adapted.methods, adapted.total, adapted.dense, adapted.adapters) == (("joint", "two_stage"), 120, 40, 20)


def test_curves_leave_out_what_was_not_scored():
    history = [{"epoch": 0.0, "wauc": None}, {"epoch": 2.0, "wauc": 0.7}, {"epoch": 1.0, "wauc": 0.6}]
    (curve,) = tabulate([line(history=history, best_epoch=2.0)]).datasets[0].curves["mlp"]
    assert (curve.epochs, curve.wauc, curve.best_epoch) == ((1.0, 2.0), (0.6, 0.7), 2.0)


def test_methods_have_their_order_and_strangers_come_last():
    lines = [line(method=method) for method in ("zeta", "bias_only", "two_stage", "alpha", "base", "joint")]
    lines += [line(method="alpha", seed=2), line(method="only_here", dataset="another")]
    tables = tabulate(lines)
    assert tables.methods == ("base", "joint", "two_stage", "bias_only", "zeta", "alpha", "only_here")
    assert tables.datasets[1].methods == ("base", "joint", "two_stage", "bias_only", "zeta", "alpha")


def test_no_base_is_a_caution():
    tables = tabulate([line(method="joint")])
    assert cells_of(tables.datasets[0].models[0])["joint"].difference.num_pairs == 0
    assert any("no runs of the base" in caution for caution in tables.cautions)


@pytest.mark.parametrize("lines", [[], [line(model="truth", method="truth")]])
def test_no_runs_are_refused(lines):
    with pytest.raises(DataError, match="at least one run of a model"):
        tabulate(lines)


# -------------------------------------------------------------------------------------------------- many comparisons


def five_seeds(model, gains, method="two_stage", **more):
    lines = [line(model, "base", seed, 0.7, **more) for seed in range(1, 6)]
    return lines + [line(model, method, seed, 0.7 + gain, **more) for seed, gain in enumerate(gains, 1)]


SURE, WEAK = (0.0100, 0.0101, 0.0099, 0.0100, 0.0102), (0.001, 0.002, 0.003, 0.0045, 0.0003)


def test_holm_takes_the_models_of_a_dataset_together_method_by_method():
    lines = five_seeds("a", SURE) + five_seeds("b", WEAK) + five_seeds("c", [-0.001, 0.001, 0.0, 0.002, -0.002])
    lines += five_seeds("a", WEAK, "joint")
    (table,) = tabulate(lines).datasets
    p = [p_value(cells_of(row)["two_stage"].difference) for row in table.models]
    assert p[0] < p[1] < 0.05 < p[2]
    adjusted = [cells_of(row)["two_stage"].p_holm for row in table.models]
    assert adjusted == pytest.approx([3 * p[0], 2 * p[1], p[2]])
    assert [cells_of(row)["two_stage"].stays for row in table.models] == [True, 2 * p[1] < 0.05, False]
    assert math.isnan(cells_of(table.models[0])["joint"].p_holm)  # one test alone is no family
    assert math.isnan(cells_of(table.mean)["two_stage"].p_holm)
    assert not cells_of(table.models[0])["base"].stays


def test_a_gain_that_does_not_stay_has_no_dagger():
    lines = five_seeds("a", SURE) + [each for n in range(9) for each in five_seeds(f"weak{n}", WEAK)]
    tables = tabulate(lines)
    text = to_markdown(tables)
    assert "| toy | a | 70.00 ± 0.00 | 71.00 ± 0.01 | +1.00 [+0.99, +1.02], gain† |" in text
    assert "| toy | weak0 | 70.00 ± 0.00 | 70.22 ± 0.17 | +0.22 [+0.01, +0.42], gain |" in text
    assert "| toy | two_stage | 10 | 10 | 0 | a |" in text
    (family,) = families(tables.datasets[0])
    assert family.sentence == ("two_stage: gain in 10 of 10 models, loss in 0; after Holm's correction 1 stays: a.")


def test_one_model_alone_has_nothing_to_correct():
    tables = tabulate(five_seeds("a", SURE))
    assert not tables.corrected
    assert families(tables.datasets[0]) == ()
    assert "gain |" in to_markdown(tables)
    assert "†" not in to_markdown(tables)


def test_an_arm_of_some_models_is_not_missing_on_the_others():
    lines = five_seeds("a", SURE) + [line("b", "base", seed) for seed in range(1, 6)]
    assert tabulate(lines).cautions == ()


def test_of_many_domains_the_largest_and_the_surest_are_shown():
    def row(number, gains):
        cells = (cells_of_gains("base", ()), cells_of_gains("joint", gains))
        return DomainRow(f"d{number}", 1000 - number, 0.2, "scored", math.nan, cells)

    rows = [row(number, SURE if number in (50, 70) else WEAK) for number in range(100)]
    shown = shown_domains(rows, limit=10)
    assert [each.name for each in shown[:5]] == ["d0", "d1", "d2", "d3", "d4"]
    assert {"d50", "d70"} <= {each.name for each in shown}
    assert len(shown) == 10
    assert [each.rows for each in shown] == sorted((each.rows for each in shown), reverse=True)
    assert shown_domains(rows[:10], limit=10) == tuple(rows[:10])


def cells_of_gains(method, gains):
    return Cell(method, spread([0.7]), paired(gains), paired([]), 1)


def test_domains_are_corrected_over_all_of_them():
    lines = []
    for seed, (one, other) in enumerate(zip(SURE, WEAK, strict=True), 1):
        lines.append(line(seed=seed, domains=[domain("app", 100, 0.7), domain("web", 300, 0.8)]))
        after = [domain("app", 100, 0.7 + one), domain("web", 300, 0.8 + other)]
        lines.append(line(method="joint", seed=seed, domains=after))
    web, app = tabulate(lines).datasets[0].domains
    p = p_value(cells_of(app)["joint"].difference)
    assert cells_of(app)["joint"].p_holm == pytest.approx(2 * p)
    assert cells_of(web)["joint"].p_holm == pytest.approx(p_value(cells_of(web)["joint"].difference))


def test_what_one_domain_costs_is_told_where_it_is_known():
    lines = [line(params_per_domain=0), line(method="joint", params_per_domain=10), line(method="old")]
    rows = tabulate(lines).datasets[0].parameters
    assert [(row.methods, row.per_domain, row.without_tables) for row in rows] == [
        (("base",), 0, 40),
        (("joint",), 10, 60),
        (("old",), None, 60),
    ]


# ------------------------------------------------------------------------------------------------------------- text


def test_many_methods_have_a_line_each():
    lines = [line(method=f"m{n}", wauc=0.7 + n / 100) for n in range(6)] + [line()]
    text = to_markdown(tabulate(lines))
    assert "| dataset | model | method | WAUC | \u2212 base | p |" in text
    assert "| toy | mlp | m3 | 73.00 | \u22122.00, one run | \u2013 |" in text


def test_csv():
    metrics = {"macro_auc": 0.5, "auc": 0.751, "log_loss": 0.4567891, "gauc": None, "best_epoch": 2.5}
    metrics |= {"kind": "other", "params_per_domain": 10, "seconds": 1.234}
    text = to_csv(tabulate([line(seed=2), line("mlp", "joint", 1, 0.7600004, **metrics), line(wauc=math.nan)]))
    assert text == (
        "dataset,model,method,seed,wauc,macro_auc,log_loss,params_total,params_adapters,"
        "auc,gauc,normalized_entropy,pcoc,ece,valid_wauc,params_tables,best_epoch,config_hash,"
        "kind,params_per_domain,seconds,selected\n"
        "toy,mlp,base,1,,,,100,0,,,,,,,60,,c0ffee,base,,,\n"
        "toy,mlp,base,2,0.750000,,,100,0,,,,,,,60,,c0ffee,base,,,\n"
        "toy,mlp,joint,1,0.760000,0.500000,0.456789,120,20,0.751000,,,,,,60,2.50,c0ffee,other,10,1.23,\n"
    )


def test_csv_quotes_names():
    assert 'a""b,c' in to_csv(tabulate([line(dataset='a"b,c')]))


def test_markdown_main_table():
    text = to_markdown(tabulate(two_models()))
    minus = "\u2212"
    assert f"| dataset | model | base | two_stage | two_stage {minus} base |" in text
    assert "| toy | dcn | 80.00 ± 0.00 | 82.00 ± 1.00 | +2.00 [\u22120.48, +4.48], no difference |" in text
    assert "| toy | mean over models | 75.00 ± 0.00 | 77.00 ± 0.00 | +2.00 [+2.00, +2.00], gain |" in text


def test_markdown_of_one_seed_says_so():
    text = to_markdown(tabulate([line(), line(method="joint", wauc=0.7525)]))
    assert "toy: one seed, no interval." in text
    assert "| toy | mlp | 75.00 | 75.25 | +0.25, one run |" in text
    assert text.count("±") == 1  # in the explanation only


def test_markdown_domains_and_parameters():
    domains = [domain("app", 1000, 0.7, 0.123), domain("none", 5, None, 0.0, "one class")]
    text = to_markdown(tabulate([line(domains=domains), line(method="joint", domains=domains)]))
    assert "| app | 1,000 | 12.3 % | 70.00 | 70.00 | 0.00, one run |" in text
    assert "| none | 5 | 0.0 % | one class |  |  |" in text
    assert "| toy | mlp | joint | 120 | 60 | 60 | 20 | \u2013 | 16.7 % | 50.0 % |" in text


def test_markdown_names_cannot_break_a_table():
    name = "a|b\n<script>\\|"
    text = to_markdown(tabulate([line(dataset=name, domains=[domain(name, 5, 0.5)])]))
    assert "<script>" not in text
    rows = [row for row in text.splitlines() if row.startswith("| a\\|b &lt;script>\\\\\\| |")]
    assert len(rows) == 3  # main, domains, parameters
    assert all(row.endswith(" |") for row in rows)
