"""A description against counts in plain Python, row by row; then its remarks, its text and its page."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.dataset import SPLITS, Dataset
from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.studies import describe
from domlora.studies.describing import census
from domlora.studies.describing.facts import Clicks, DomainFacts, wilson
from domlora.studies.describing.facts_text import interval
from domlora.studies.describing.reach import reaches
from domlora.studies.reporting import plots
from domlora.studies.reporting.statistics import MINUS

HOSTILE = """"><script>alert(1)</script><img src=x onerror=alert(2)> | ' {{ 7 * 7 }} \u2028"""
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Words:
    """An encoder as far as a description asks for one."""

    def __init__(self, **vocabularies: tuple[str, ...]) -> None:
        self.vocabularies = vocabularies


def dataset_of(
    schema: Schema, splits: dict[str, Batch], manifest: dict[str, Any] | None = None, **words: tuple[str, ...]
) -> Dataset:
    dataset = Dataset.from_batches(schema, splits, encoder=Words(**words))  # type: ignore[arg-type]
    dataset.manifest |= manifest or {}
    return dataset


# ------------------------------------------------------------------------------------- against a count row by row

SCHEMA = Schema(
    (
        Feature("user", num_ids=12),
        Feature("item", num_ids=9),
        Feature("query", num_ids=7, hash_buckets=5),
        Feature("history", "sequence", num_ids=9, max_length=3, share="item"),
        Feature("age", "bucketed", num_ids=5, boundaries=(10.0, 20.5)),
        Feature("price", "numeric", mean=3.0, std=2.0, missing=True),
        Feature("score", "numeric", transform="log1p"),
    ),
    domains=("app", "web", "tv"),
    user="user",
)
SLOTS = {"user": slice(0, 1), "item": slice(1, 2), "query": slice(2, 3), "history": slice(3, 6), "age": slice(6, 7)}


def rows(draw: np.random.Generator, num: int) -> Batch:
    """Random rows: all ids may be absent or unknown, domains unknown, users absent, prices missing."""
    sizes = [f.num_ids for f in SCHEMA.categorical for _ in range(f.max_length)]
    ids = np.stack([draw.integers(0, size, num) for size in sizes], axis=1)
    length = draw.integers(0, 4, num)
    ids[:, SLOTS["history"]] *= np.arange(3) < length[:, None]
    ids[:, SLOTS["history"]] += (np.arange(3) < length[:, None]) & (ids[:, SLOTS["history"]] == 0)
    missing = draw.integers(0, 2, num)
    price = np.where(missing == 1, 0.0, draw.normal(size=num))
    return Batch(
        ids=torch.from_numpy(ids),
        dense=torch.from_numpy(np.stack([price, missing, draw.normal(size=num)], axis=1).astype(np.float32)),
        domain=torch.from_numpy(draw.integers(-1, 3, num)),
        label=torch.from_numpy(draw.integers(0, 2, num).astype(np.float32)),
        user=torch.from_numpy(draw.integers(-1, 6, num)),
    )


class Plain:
    """The same figures by loops over rows."""

    def __init__(self, splits: dict[str, Batch]) -> None:
        self.splits = splits

    def of(self, split: str | None, domain: int | None) -> list[dict[str, Any]]:
        """Rows of a split (None: of all) and of a domain."""
        batches = [batch for name, batch in self.splits.items() if split in (None, name)]
        found = [
            {"ids": ids, "dense": dense, "domain": number, "label": label, "user": user}
            for batch in batches
            for ids, dense, number, label, user in zip(
                batch.ids.tolist(),
                batch.dense.tolist(),
                batch.domain.tolist(),
                batch.label.tolist(),
                batch.user.tolist(),
                strict=True,
            )
        ]
        return [row for row in found if domain is None or row["domain"] == domain]

    def values(self, of: str, split: str | None, domain: int | None) -> set[int]:
        if of == "users":
            return {row["user"] for row in self.of(split, domain)} - {-1}
        return {row["ids"][1] for row in self.of(split, domain)} - {0, 1}


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def near(value: float | None, expected: float | None) -> bool:
    return value is None if expected is None else value == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), sizes=st.tuples(*[st.integers(0, 40)] * 3), batch_rows=st.integers(1, 50))
def test_every_figure_against_a_count_row_by_row(seed: int, sizes: tuple[int, int, int], batch_rows: int) -> None:
    draw = np.random.default_rng(seed)
    splits = {name: rows(draw, size) for name, size in zip(SPLITS, sizes, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census, "BATCH_ROWS", batch_rows)
        found = describe.describe(dataset_of(SCHEMA, splits))
    plain = Plain(splits)
    numbers = {name: number for number, name in enumerate(SCHEMA.domains)} | {"all": None, "(unknown)": -1}
    listed = [*found.domains, found.total, *([found.unknown] if found.unknown else [])]
    assert (found.unknown is not None) == bool(plain.of(None, -1))
    for domain in listed:
        check_domain(domain, numbers[domain.name], plain)
    check_overlaps(found, plain)
    check_features(found, plain)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.to_markdown()


def check_domain(domain: DomainFacts, number: int | None, plain: Plain) -> None:
    mine = plain.of(None, number)
    assert domain.total.rows == len(mine)
    assert near(domain.share, ratio(len(mine), len(plain.of(None, None))))
    for split in SPLITS:
        some = plain.of(split, number)
        assert domain.splits[split].rows == len(some)
        assert domain.splits[split].clicks == sum(row["label"] for row in some)
        for name, slots in SLOTS.items():
            cells = [row["ids"][slots] for row in some]
            coverage = domain.features[name][split]
            assert near(coverage.absent, ratio(sum(not any(cell) for cell in cells), len(cells)))
            flat = [value for cell in cells for value in cell if value]
            told = name not in ("query", "age")
            assert near(coverage.unknown, ratio(flat.count(1), len(flat)) if told else None)
        prices = [row["dense"][1] for row in some]
        assert near(domain.features["price"][split].absent, ratio(sum(prices), len(prices)))
        assert domain.features["score"][split].absent is None
    check_reach(domain, number, plain, "users")
    check_reach(domain, number, plain, "items")


def check_reach(domain: DomainFacts, number: int | None, plain: Plain, of: str) -> None:
    reach = getattr(domain, of)
    mine, trained = plain.values(of, None, number), plain.values(of, "train", None)
    assert reach.distinct == len(mine)
    usable = [r for r in plain.of(None, number) if (r["user"] != -1 if of == "users" else r["ids"][1] > 1)]
    assert near(reach.rows_each, ratio(len(usable), len(mine)))
    homes = {value: [d for d in (-1, 0, 1, 2) if value in plain.values(of, None, d)] for value in mine}
    assert near(reach.elsewhere, ratio(sum(len(homes[value]) > 1 for value in mine), len(mine)))

    tested = plain.values(of, "test", number)
    assert near(reach.new, ratio(len(tested - trained), len(tested)) if of == "users" else None)
    here = plain.values(of, "train", number)
    assert near(reach.new_here, ratio(len((tested & trained) - here), len(tested)) if number is not None else None)
    test_rows = plain.of("test", number)
    if of == "users":
        asked = [row["user"] for row in test_rows if row["user"] != -1]
    else:
        asked = [row["ids"][1] for row in test_rows if row["ids"][1]]
    assert near(reach.new_rows, ratio(sum(value not in trained for value in asked), len(asked)))


def check_overlaps(found: describe.Description, plain: Plain) -> None:
    for overlap, of in zip(found.overlaps, ("users", "items"), strict=True):
        assert overlap.of == of
        assert overlap.domains == tuple(domain.name for domain in found.domains)
        sets = [plain.values(of, None, SCHEMA.domains.index(name)) for name in overlap.domains]
        for mine, shares in zip(sets, overlap.shares, strict=True):
            expected = [ratio(len(mine & other), len(mine)) for other in sets]
            assert all(near(*pair) for pair in zip(shares, expected, strict=True))


def check_features(found: describe.Description, plain: Plain) -> None:
    features = {feature.name: feature for feature in found.features}
    train = plain.of("train", None)
    for name, slots in SLOTS.items():
        feature = features[name]
        flat = [value for row in train for value in row["ids"][slots] if value]
        known = [value for value in flat if value > 1]
        assert feature.used == len(set(known))
        counts = sorted((known.count(value) for value in set(known)), reverse=True)[:5]
        assert [share for _, share in feature.top] == [pytest.approx(count / len(flat)) for count in counts]
        absent = any(not any(row["ids"][slots]) for row in train)
        assert feature.constant == (len({*flat, *([0] * absent)}) == 1)
    lengths = [sum(map(bool, row["ids"][SLOTS["history"]])) for row in train]
    assert near(features["history"].mean_length, ratio(sum(lengths), sum(map(bool, lengths))))
    prices = [3.0 + 2.0 * row["dense"][0] for row in train if not row["dense"][1]]
    assert near(features["price"].mean, float(np.mean(prices)) if prices else None)
    assert near(features["price"].std, float(np.std(prices)) if prices else None)
    assert features["price"].constant == (len({tuple(row["dense"][:2]) for row in train}) == 1)
    scores, later = ([row["dense"][2] for row in plain.of(split, None)] for split in ("train", "test"))
    if len(scores) > 1 and later:
        shift = (np.mean(later) - np.mean(scores)) / np.std(scores)
        assert features["score"].shift == pytest.approx(float(shift), abs=1e-5)


def test_a_sample_of_users_gives_the_same_shares() -> None:
    """With room for a tenth of the users, shares stay near those of all of them."""
    draw = np.random.default_rng(1)
    schema = Schema((Feature("item", num_ids=100),), domains=("a", "b"), user="user")

    def some(num: int) -> Batch:
        user, domain = draw.integers(0, 20_000, num), draw.integers(0, 2, num)
        user += 10_000 * domain  # half of each domain's users are the other's, too
        ids, label = draw.integers(2, 100, (num, 1)), draw.integers(0, 2, num)
        return Batch(
            ids=torch.from_numpy(ids),
            dense=torch.zeros(num, 0),
            domain=torch.from_numpy(domain),
            label=torch.from_numpy(label).float(),
            user=torch.from_numpy(user),
        )

    dataset = dataset_of(schema, {"train": some(30_000), "valid": some(1_000), "test": some(30_000)})
    exact = census.take_census(dataset, "item")
    sampled = census.take_census(dataset, "item", limit=8_000)
    assert (exact.users.scale, exact.items.scale, sampled.items.scale) == (1, 1, 1)
    assert sampled.users.scale > 4
    for true, near_it in zip(reaches(exact, "users"), reaches(sampled, "users"), strict=True):
        for name in ("distinct", "rows_each", "elsewhere", "new", "new_here", "new_rows"):
            value, estimate = getattr(true, name), getattr(near_it, name)
            assert (value is None) == (estimate is None)
            assert value is None or estimate == pytest.approx(value, rel=0.15), name


# --------------------------------------------------------------------------------------------------- single figures


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 30), (30, 30), (5, 10), (7, 10**9)])
def test_wilson_interval_solves_its_equation(hits: int, trials: int) -> None:
    """Its ends are the shares p at which |hits/trials - p| is 1.96 standard errors of p."""
    for end in wilson(hits, trials):
        inside = 0.0 < end < 1.0
        error = 1.959963984540054 * math.sqrt(end * (1 - end) / trials)
        assert not inside or abs(hits / trials - end) == pytest.approx(error, rel=1e-6)
    assert wilson(0, 0) == (None, None)


def test_values_are_named_by_what_they_stand_for() -> None:
    draw = np.random.default_rng(3)
    words = tuple(f"item {number}" for number in range(7))
    found = describe.describe(dataset_of(SCHEMA, {"train": rows(draw, 500)}, item=words))
    tops = {feature.name: [text for text, _ in feature.top] for feature in found.features}
    assert set(tops["item"]) <= set(words)
    assert set(tops["history"]) <= set(words)  # it shares the vocabulary of items
    assert set(tops["age"]) == {"below 10", "10 to 20.5", "from 20.5"}
    assert set(tops["query"]) == {f"hash bucket {number}" for number in range(5)}
    assert set(tops["user"]) <= {f"id {number}" for number in range(2, 12)}  # no vocabulary is known


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ({}, "item"),  # not the user, though it has most values
        ({"plan": {"columns": {"item": "shop"}}}, "shop"),
        ({"plan": {"columns": {"item": "gone"}}}, "item"),
        ({"plan": {}}, "item"),
    ],
)
def test_items_are_what_the_plan_says_or_the_largest_feature(manifest: dict[str, Any], expected: str) -> None:
    features = (
        Feature("u", num_ids=90, columns=("user",)),
        Feature("page", num_ids=80),
        Feature("item_by_user", num_ids=70, columns=("item", "user")),
        Feature("seen", "sequence", num_ids=60, max_length=1),
        Feature("item", num_ids=50),
        Feature("store", num_ids=40, columns=("shop",)),
    )
    schema = Schema(features, domains=("a",), domain="page", user="user")
    batch = Batch(torch.full((4, 6), 2), torch.zeros(4, 0), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    found = describe.describe(dataset_of(schema, {"train": batch._replace(user=torch.arange(4))}, manifest))
    assert found.item_feature == ("store" if expected == "shop" else expected)


def test_without_users_and_items() -> None:
    found = describe.describe(World(num_domains=3).dataset(2_000, seed=1)[0])
    assert (found.user_column, found.item_feature, found.total.users, found.total.items) == (None, None, None, None)
    assert found.overlaps == ()
    assert found.flow is None
    assert "users" not in found.to_markdown()
    assert "2,000 rows in 3 domains" in Page(found.to_html()).text


# ---------------------------------------------------------------------------------------------------------- remarks


def split_of(rates: dict[int, tuple[int, int]], item: int = 2) -> Batch:
    """Rows by domain: how many, and how many of them clicks. Each domain has its own users."""
    domain = np.concatenate([np.full(total, number) for number, (total, _) in rates.items()])
    label = np.concatenate([np.arange(total) < clicks for total, clicks in rates.values()])
    ids = np.stack([np.full(len(domain), item), 2 + np.arange(len(domain)) % 2], axis=1)
    user = torch.from_numpy(1000 * domain + np.arange(len(domain)) % 50)
    dense = torch.zeros(len(domain), 0)
    return Batch(torch.from_numpy(ids), dense, torch.from_numpy(domain), torch.from_numpy(label).float(), None, user)


PLAIN = Schema((Feature("item", num_ids=9), Feature("side", num_ids=4)), domains=("app", "web"), user="user")


def remarks(train: Batch, valid: Batch, test: Batch) -> list[str]:
    return list(describe.describe(dataset_of(PLAIN, {"train": train, "valid": valid, "test": test})).remarks)


def test_nothing_to_remark() -> None:
    some = split_of({0: (400, 100), 1: (400, 100)})
    mixed = some._replace(user=torch.arange(800) % 50)
    mixed.ids[:, 0] = 2 + torch.arange(800) % 7
    assert remarks(mixed, mixed, mixed) == []


def test_every_remark() -> None:
    train = split_of({0: (1000, 600), 1: (100, 0)})
    found = remarks(train, split_of({0: (10, 5)}), split_of({0: (1000, 100), 1: (50, 1)}, item=1))
    assert found == [
        "1 domain has one class in train: web (100 rows, no clicks).",
        "1 domain has fewer than 100 clicks in all: web (1).",
        "1 domain has a click rate in test that is more than 3 times that in train, or less than a third: "
        "app (60.0 % to 10.0 %).",
        "Every user is in one domain alone: the domain is as good as a property of the user.",
        "Feature item is the same in every training row.",
        "Feature item: 100 % of its values in test are not in the vocabulary; most in web (100 %).",
    ]


def test_remarks_on_splits_and_unknown_domains() -> None:
    valid = split_of({0: (4, 4), 1: (300, 100)})
    found = remarks(split_of({0: (400, 100)}), valid, valid.take(slice(0, 0)))
    assert found[0] == "The test split has no rows."
    assert "1 domain has no training rows: web (300 rows)." in found
    assert "1 domain has one class in valid, so no AUC there: app (4 rows, all clicks)." in found
    stray = valid._replace(domain=torch.full_like(valid.domain, -1))
    assert "304 rows are of unknown domains, which have no adapter." in remarks(valid, stray, valid)
    nothing = valid.take(slice(0, 0))
    assert remarks(nothing, nothing, nothing) == ["The dataset has no rows."]


def test_a_rate_that_moves_by_chance_is_no_remark() -> None:
    """1 of 10 against 4 of 10 is a factor of 4, and the intervals hold each other."""
    found = remarks(split_of({0: (10, 1)}), split_of({0: (10, 1)}), split_of({0: (10, 4)}))
    assert not any("click rate" in remark for remark in found)


def test_many_domains_are_one_remark() -> None:
    schema = Schema((Feature("item", num_ids=9),), domains=tuple(f"d{number}" for number in range(30)))
    batch = Batch(
        2 + torch.arange(300)[:, None] % 7, torch.zeros(300, 0), torch.arange(300) % 30, (torch.arange(300) % 2).float()
    )
    found = describe.describe(dataset_of(schema, {"train": batch, "valid": batch, "test": batch}))
    assert len(found.remarks) == 4
    assert found.remarks[-1] == (
        "30 domains have fewer than 100 clicks in all: d0 (0), d1 (30), d2 (0), d3 (30), d4 (0) and 25 more."
    )


# ------------------------------------------------------------------------------------------------------ text and page


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

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


MANIFEST = {
    "source": "shop log",
    "library_version": "9.9",
    "inputs": {"log.parquet": "abc"},
    "rows": {
        "in": 1000,
        "quarantined": {"label missing": 7},
        "dropped": {"k-core": 30, "unique": 0},
        "sampled": 5,
        "kept": 968,
    },
}


def many(num_domains: int, name: str = "domain") -> describe.Description:
    draw = np.random.default_rng(num_domains)
    schema = replace(SCHEMA, domains=tuple(f"{name} {number}" for number in range(num_domains)))

    def some() -> Batch:
        batch = rows(draw, 3_000)
        return batch._replace(domain=torch.from_numpy(draw.zipf(1.5, 3_000) % num_domains))

    splits = {split: some() for split in SPLITS}
    return describe.describe(dataset_of(schema, splits, MANIFEST, item=tuple(f"{name} i{n}" for n in range(7))))


@pytest.mark.parametrize("num_domains", [1, 2, 10, 200])
def test_the_text_fits_a_terminal(num_domains: int) -> None:
    found = many(num_domains)
    text = found.to_markdown()
    assert max(map(len, text.splitlines())) <= 110
    assert text.startswith("# shop log\n\n9,000 rows in ")
    assert len(text.splitlines()) < 160
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for lines in tables:
        assert len({len(line) for line in lines}) == 1, "columns must line up"
        assert len({line.count("|") for line in lines}) == 1
    assert ("more with" in text) == (num_domains > 20)


def test_rows_are_accounted_for() -> None:
    found = many(2)
    assert found.flow is not None
    assert found.flow.steps() == [
        ("read", 1000),
        ("quarantined: label missing", -7),
        ("dropped: k-core", -30),
        ("sampled non-clicks", 5),
        ("kept", 968),
    ]
    assert re.search(rf"\| dropped: k-core +\| +{MINUS}30 \|", found.to_markdown())
    assert f"dropped: k-core {MINUS}30" in Page(found.to_html()).text


@pytest.mark.parametrize("num_domains", [1, 10, 200])
def test_the_page_is_sound_and_holds_every_domain(num_domains: int) -> None:
    found = many(num_domains)
    html = found.to_html()
    page = Page(html)
    assert html == found.to_html()
    for number in range(num_domains):
        assert f"domain {number}" in page.words
    assert not {"script", "link rel", "iframe", "object"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src"):
            assert value.startswith("#") or (tag, value) == ("link", "data:,")
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    anchors = {value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"}
    assert anchors <= set(ids)
    svg = re.search(r"<svg.*?</svg>", html, re.DOTALL)
    assert svg is not None
    ElementTree.fromstring(svg.group())


def test_click_rates_are_drawn_by_name_for_few_domains_and_by_size_for_many() -> None:
    few, lots = many(12), many(60)
    svg = ElementTree.fromstring(plots.click_rates(few.domains, few.total.total, "rates"))
    words = [element.text or "" for element in svg.iter("text")]
    assert {domain.name for domain in few.domains} <= set(words)
    assert all(interval(domain.total) in (svg.findtext("desc") or "") for domain in few.domains)
    svg = ElementTree.fromstring(plots.click_rates_by_size(lots.domains, lots.total.total, "rates"))
    words = [element.text or "" for element in svg.iter("text")]
    named = [domain for domain in lots.domains if domain.name in words]
    assert lots.domains[0] in named  # the largest
    rates = [domain.total.rate for domain in lots.domains]
    assert {min(rates), max(rates)} <= {domain.total.rate for domain in named}
    assert len(named) <= 3
    assert "rows" in words


@pytest.mark.parametrize("num_domains", [3, 12])
def test_names_stay_text(num_domains: int) -> None:
    found = many(num_domains, HOSTILE)
    page = Page(found.to_html())
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.text.count("{{ 7 * 7 }} ") > 10
    for line in found.to_markdown().splitlines():
        assert "<script" not in line


def test_a_page_without_its_libraries_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = many(1)
    monkeypatch.setitem(sys.modules, "domlora.studies.describing.facts_page", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'domlora[report]'")) as error:
        found.to_html()
    assert "\n" not in str(error.value)


def test_text_needs_no_libraries_of_the_page() -> None:
    code = (
        "import sys, domlora.studies.describe as d; from domlora.data.synthetic import World;"
        "d.describe(World(num_domains=2).dataset(100, seed=1)[0]).to_markdown();"
        "print({'matplotlib', 'jinja2', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_figures_are_plain_data() -> None:
    found = many(10)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["total"]["total"]["rows"] == 9_000
    assert read["flow"]["quarantined"] == {"label missing": 7}
    assert Clicks(**read["domains"][0]["splits"]["test"]) == found.domains[0].splits["test"]
