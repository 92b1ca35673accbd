"""The page of generated results: honest sentences, sound HTML, no way in for a name, no way out to a network."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domlora.errors import DataError
from domlora.studies.report import write_report
from domlora.studies.reporting.findings import findings
from domlora.studies.reporting.tables import tabulate

HOSTILE = """"><script>alert(1)</script><img src=x onerror=alert(2)> ' {{ 7 * 7 }} \u2028"""
VOID = {"meta", "link", "br", "img", "input", "hr"}
METHODS = ("base", "joint", "two_stage", "bias_only")


def results(
    *,
    dataset: str = "toy",
    models: tuple[str, ...] = ("deepfm",),
    methods: tuple[str, ...] = METHODS[:3],
    num_seeds: int = 3,
    num_domains: int = 2,
    effect: float = 0.002,
    noise: float = 0.001,
    truth: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Result lines as a study writes them; the last of three domains or more has one class."""
    random = np.random.default_rng(seed)
    offset = random.normal(0.0, 0.03, num_domains)
    lines = []
    for model in models:
        for number in range(1, num_seeds + 1):
            start = 0.77 + random.normal(0.0, 0.003)
            for method in methods:
                gain = 0.0 if method == "base" else effect + random.normal(0.0, noise)
                lines.append(_line(dataset, model, method, number, start + gain + offset))
    if truth:
        lines.append(_line(dataset, "truth", "truth", 0, 0.85 + offset))
    return lines


def _line(dataset: str, model: str, method: str, seed: int, auc: np.ndarray) -> dict[str, Any]:
    domains = [_domain(number, float(value), len(auc)) for number, value in enumerate(auc)]
    scored = [domain for domain in domains if domain["status"] == "scored"]
    wauc = sum(d["rows"] * d["auc"] for d in scored) / sum(d["rows"] for d in scored)
    adapters = {"base": 0, "truth": 0, "bias_only": 448 * len(auc)}.get(method, 8768 * len(auc))
    low = 0.5 if method in ("base", "joint") else wauc - 0.002
    history = [{"epoch": float(e), "loss": None, "wauc": wauc - (wauc - low) * math.exp(-e)} for e in range(4)]
    return {
        "study": "demo",
        "dataset": dataset,
        "model": model,
        "method": method,
        "seed": seed,
        "key": f"{dataset}/{model}/{method}/{seed}",
        "config_hash": f"hash-of-{model}",
        "data_fingerprint": f"print-of-{dataset}",
        "wauc": wauc,
        "macro_auc": wauc - 0.01,
        "gauc": None,
        "log_loss": 0.45,
        "valid_wauc": wauc,
        "best_epoch": 3.0,
        "seconds": 12.0,
        "params_total": 140_000 + adapters,
        "params_tables": 88_000,
        "params_adapters": adapters,
        "domains": domains,
        "history": [] if method == "truth" else history,
        "versions": {"domlora": "0.1.0", "torch": "2.13.0"},
    }


def _domain(number: int, auc: float, num_domains: int) -> dict[str, Any]:
    lone = num_domains > 2 and number == num_domains - 1
    status = "one class" if lone else "scored"
    rows = 9000 // (number + 1)
    return {
        "name": f"d{number}",
        "rows": rows,
        "click_rate": 0.0 if lone else 0.2,
        "auc": None if lone else auc,
        "status": status,
    }


class Page(HTMLParser):
    """Tags, attributes and words; every tag that opens must close, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def page_of(lines: list[dict[str, Any]], folder: Path, **options: Any) -> tuple[str, Page]:
    out = folder / "report.html"
    write_report(lines, out, **options)
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


SHAPES = {
    "one of all": {"num_seeds": 1, "num_domains": 1, "methods": ("base", "two_stage")},
    "many domains, truth": {"num_domains": 21, "methods": METHODS, "truth": True, "num_seeds": 2},
    "many models": {"models": tuple(f"m{n}" for n in range(4)), "num_seeds": 2},
    "base alone": {"methods": ("base",)},
    "no base": {"methods": ("joint",)},
    "a stranger": {"methods": ("base", "mine")},
    "many methods": {"methods": ("base", *(f"m{n}" for n in range(9))), "models": ("a", "b", "c", "d", "e")},
    "hundreds of domains": {"num_domains": 300, "methods": METHODS[:2]},
}


SMALL = results(num_seeds=1, methods=("base", "two_stage"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, tuple[str, Page]]:
    return {name: page_of(results(**shape), tmp_path_factory.mktemp("page")) for name, shape in SHAPES.items()}


@pytest.fixture(params=SHAPES)
def shaped(request, pages) -> tuple[str, Page]:
    return pages[request.param]


def test_page_is_sound(shaped):
    _, page = shaped
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert page.tags.count("h1") == 1
    assert page.tags.count("table") == page.tags.count("caption")
    for target in [value[1:] for value in page.values("href") if value.startswith("#")]:
        assert target in ids
    for names in page.values("aria-labelledby"):
        assert set(names.split()) <= set(ids)


def test_page_reaches_for_nothing(shaped):
    text, page = shaped
    assert not re.search(r"https?:|ftp:|//[\w]|@import|<script|<iframe|<object|<embed|\burl\((?!#)", text)
    assert all(value.startswith("#") or value == "data:," for value in page.values("href"))
    assert page.values("src") == []
    assert any("default-src 'none'" in value for value in page.values("content"))


def test_page_shows_no_nan(shaped):
    assert not re.search(r"\bnan\b|\bNone\b|Undefined", shaped[1].text)


def test_tables_are_for_everybody(shaped):
    _, page = shaped
    assert all(
        scope in ("col", "row", "rowgroup") for tag, name, scope in page.attributes if (tag, name) == ("th", "scope")
    )
    assert page.tags.count("th") == len([1 for tag, name, _ in page.attributes if (tag, name) == ("th", "scope")])
    regions = [value for value in page.values("role") if value == "region"]
    assert len(regions) == page.values("tabindex").count("0") > 0


# -------------------------------------------------------------------------------------------------- what is said


def lines_with(*differences: float, models: tuple[str, ...] = ("mlp",), **more: float) -> list[dict[str, Any]]:
    """Runs of base at 0.7 and of two_stage, with these differences, seed by seed."""
    lines = []
    for model in models:
        for seed, difference in enumerate(differences, 1):
            for method, wauc in (("base", 0.7), ("two_stage", 0.7 + difference)):
                lines.append({**_line("toy", model, method, seed, np.array([0.7])), "wauc": wauc, **more})
    return lines


def sentence_of(lines: list[dict[str, Any]]) -> str:
    return findings(tabulate(lines).datasets[0])[0].sentence


def test_sentence_of_a_gain_inside_its_interval():
    # mean 0.12 points, std 0.14, t(0.975, 2) = 4.3027: half width 0.3478
    assert sentence_of(lines_with(-0.0002, 0.0012, 0.0026)) == (
        "Adapters (two_stage) change WAUC by +0.12 points [\u22120.23, +0.47] over 3 seeds: no difference."
    )


def test_sentences_of_a_gain_and_of_a_loss():
    assert sentence_of(lines_with(0.010, 0.011, 0.012)).endswith("[+0.85, +1.35] over 3 seeds: a gain.")
    assert sentence_of(lines_with(-0.010, -0.011, -0.012)).endswith("over 3 seeds: a loss.")


def test_sentence_of_one_seed():
    assert sentence_of(lines_with(0.5)) == (
        "Adapters (two_stage) change WAUC by +50.00 points with one seed: no interval, so nothing is proven."
    )


def test_sentence_over_models_counts_seeds_and_not_runs():
    sentence = sentence_of(lines_with(0.01, 0.02, models=("dcn", "mlp")))
    assert sentence.startswith("Averaged over 2 models, adapters (two_stage) change WAUC by +1.50 points")
    assert "over 2 seeds" in sentence


def test_sentence_with_a_truth():
    truth = {**_line("toy", "truth", "truth", 0, np.array([0.8])), "wauc": 0.8}
    assert sentence_of([*lines_with(0.05, 0.05), truth]).endswith(
        "a gain. Share of the gap to the truth closed: 50 % [50 %, 50 %]."
    )


def test_two_stage_leads_and_all_methods_are_there():
    dataset = tabulate(results(methods=METHODS)).datasets[0]
    assert [finding.method for finding in findings(dataset)] == ["two_stage", "joint", "bias_only"]


def test_page_says_the_finding_first(tmp_path):
    lines = lines_with(-0.0002, 0.0012, 0.0026)
    _, page = page_of(lines, tmp_path)
    assert sentence_of(lines) in page.text
    assert page.text.index(sentence_of(lines)) < page.text.rindex("WAUC by model")
    assert "\u25b2" not in page.text
    assert "chip gain" not in page.values("class")
    assert "chip same" in page.values("class")


def test_one_seed_is_said_plainly(pages):
    page = pages["one of all"][1]
    assert "toy: one seed, no interval." in page.text
    assert "±" not in page.text.replace("mean ± standard deviation", "")


def test_one_class_is_shown_as_such(pages):
    page = pages["many domains, truth"][1]
    assert "one class: no AUC" in page.text
    assert "one class in 1" in page.text


def test_many_intervals_come_with_a_warning(pages):
    page = pages["many domains, truth"][1]  # 20 scored domains, three methods against the base
    assert "misses zero with a chance of 5 % where there is no difference: of 60 about 3" in page.text
    assert "with a chance of 5 %" not in pages["one of all"][1].text


def test_how_it_was_made(tmp_path):
    _, page = page_of(results(), tmp_path, command="domlora study demo.toml", notes=["One note.", "Another."])
    for said in ("domlora study demo.toml", "hash-of-deepfm", "print-of-toy", "torch 2.13.0", "One note.", "Another."):
        assert said in page.text
    assert "108 seconds" in page.text  # nine runs of twelve


def test_cautions_are_shown(tmp_path):
    _, page = page_of(results()[:-1], tmp_path)
    assert "1 of 9 runs (models, methods, seeds) are missing" in page.text


# ------------------------------------------------------------------------------------------------- parts of the page


def headings(text: str) -> list[str]:
    return re.findall(r"<h3 id=[^>]*>([^<]*)</h3>", text)


def test_contents_lead_to_every_part(shaped):
    text, _ = shaped
    contents = re.search(r"<nav.*?</nav>", text, flags=re.DOTALL)
    assert contents is not None
    listed = re.findall(r'<a href="#([^"]*)">', contents.group())
    parts = re.findall(r'<h3 id="([^"]*)"', text) + re.findall(r'<section id="([^"]*)"', text)
    assert set(listed) == set(parts)


def with_arms(lines: list[dict[str, Any]], kind: str = "two_stage") -> list[dict[str, Any]]:
    """Arms called t4, t16 ... as those of a sweep of the temperature."""
    for line in lines:
        if re.fullmatch(r"t\d+", line["method"]):
            line |= {"kind": kind, "config": {"method": kind, "adapter": {"temperature": int(line["method"][1:])}}}
    return lines


def test_a_sweep_has_its_curve(tmp_path):
    lines = with_arms(results(methods=("base", "t4", "t16", "t64")))
    text, page = page_of(lines, tmp_path, markdown=tmp_path / "r.md")
    assert "Options" in headings(text)
    assert "adapter.temperature: difference to the base with its 95 % interval, deepfm." in page.text
    assert "| adapter.temperature | two_stage | deepfm | 16 |" in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "t64" in page.text[page.text.rindex("Arms: a method with options of its own") :]


def test_steps_have_their_waterfall_and_table(tmp_path):
    facts = {"steps": ["one", "two"], "titles": {"one": "+ dropout dead", "two": "+ L2"}}
    lines = results(methods=("base", "one", "two"))
    text, page = page_of(lines, tmp_path, facts=facts, markdown=tmp_path / "r.md")
    assert "What each switch moves" in headings(text)
    assert "Each arm changes one thing more than the one before it, from base on." in page.text
    assert "against the step before" in page.text
    assert "| deepfm | + dropout dead |" in (tmp_path / "r.md").read_text(encoding="utf-8")


def test_many_methods_have_a_line_each(pages):
    text, page = pages["many methods"]
    assert "All arms" in headings(text)
    assert "difference to the base p p, Holm" in page.text
    assert "toy, mean over models" in page.text


def test_holm_is_told_for_several_models_only(pages):
    assert "p-values, before and after Holm" in pages["many models"][1].text
    assert "Holm" not in pages["one of all"][1].text


def test_of_hundreds_of_domains_a_few_are_shown_and_all_are_counted(pages):
    text, page = pages["hundreds of domains"]
    assert "300 domains: shown are the 20 largest" in page.text
    assert len(re.findall(r'<tr><th scope="row">d\d+</th>', text)) == 40
    counts = re.search(r"joint in all domains: ([^.]*)\.", page.text)
    assert counts is not None
    assert sum(map(int, re.findall(r" in (\d+)", counts[1]))) == 300
    assert len(text) < 1_500_000


# --------------------------------------------------------------------------------------------------------- safety


def test_no_name_gets_into_the_page(tmp_path):
    lines = results(methods=("base", HOSTILE), num_domains=2, num_seeds=2)
    for line in lines:
        line |= {
            "dataset": HOSTILE,
            "model": HOSTILE,
            "study": HOSTILE,
            "config_hash": HOSTILE,
            "data_fingerprint": HOSTILE,
        }
        line["versions"] = {HOSTILE: HOSTILE}
        line["domains"] = [{**domain, "name": f"{HOSTILE}{number}"} for number, domain in enumerate(line["domains"])]
        line["domains"][1] |= {"status": HOSTILE}
    facts = {"titles": {HOSTILE: f"+ {HOSTILE}"}, "reference": HOSTILE}
    text, page = page_of(
        lines, tmp_path, title=HOSTILE, notes=[HOSTILE], command=HOSTILE, facts=facts, markdown=tmp_path / "r.md"
    )
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script" not in text
    assert page.text.count("{{ 7 * 7 }}") > 10
    assert "<script" not in (tmp_path / "r.md").read_text(encoding="utf-8").split("Made with:")[0]


def test_same_results_same_bytes_in_any_order(tmp_path):
    lines = results(truth=True, num_seeds=2, methods=METHODS[:2])
    paths = [tmp_path / str(number) for number in range(2)]
    for path, order in zip(paths, (lines, lines[::-1]), strict=True):
        write_report(order, path / "r.html", markdown=path / "r.md", latex=path / "r.tex", csv=path / "r.csv")
    for name in ("r.html", "r.md", "r.tex", "r.csv"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()


def test_tables_are_written_beside_the_page(tmp_path):
    paths = {"markdown": tmp_path / "deep" / "r.md", "latex": tmp_path / "r.tex", "csv": tmp_path / "r.csv"}
    write_report(SMALL, tmp_path / "r.html", **paths, title="Toy | study")
    text = (tmp_path / "deep" / "r.md").read_text(encoding="utf-8")
    assert text.startswith("# Toy \\| study\n\n**toy**\n\n- Adapters (two_stage) change WAUC by ")
    assert "| toy | deepfm |" in text
    assert r"\toprule" in paths["latex"].read_text(encoding="utf-8")
    assert len((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("old")

    def fails(self: Path, target: Path) -> Path:
        raise OSError("disk")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk"):
        write_report(SMALL, out)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_folder_in_the_way_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"possible to write.*directory"):
        write_report(SMALL, tmp_path)


def test_nothing_is_written_of_nothing(tmp_path):
    with pytest.raises(DataError, match="at least one run"):
        write_report([], tmp_path / "r.html", csv=tmp_path / "r.csv")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ looks


def themes() -> list[dict[str, str]]:
    """The colours of the light page and of the dark one."""
    text = files("domlora.studies.reporting").joinpath("report.html").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", block)) for block in blocks]


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    colours = themes()[theme]
    for back in ("page", "surface"):
        for words in ("ink", "quiet", "link"):
            assert contrast(colours[words], colours[back]) >= 4.5, (words, back)
        for number in range(1, 9):
            assert contrast(colours[f"series-{number}"], colours[back]) >= 3.0, (number, back)
    for words, back in (("gain", "gain-back"), ("loss", "loss-back"), ("ink", "same-back"), ("ink", "loss-back")):
        assert contrast(colours[words], colours[back]) >= 4.5, (words, back)


def test_contrast_is_measured_right():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_the_page_says_what_was_selected(tmp_path: Path) -> None:
    facts = {"select": {HOSTILE: {"of": ["base", "joint"]}}}
    lines = results(num_seeds=4, effect=0.01)
    text, page = page_of(lines, tmp_path, facts=facts)
    assert "4 of 4 seeds" in page.text
    assert "12 runs on 1 dataset" in page.text
    assert "<script" not in text
    assert "What was selected" not in page_of(lines, tmp_path)[1].text
