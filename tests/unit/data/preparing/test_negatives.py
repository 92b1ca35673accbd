from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from domlora.data.engine import Engine, open_engine
from domlora.data.plan import Negatives
from domlora.data.preparing.negatives import click_shares, sampled
from domlora.errors import ConfigError, DataError

Row = dict[str, Any]
PUBLISHED = (  # c of the authors' domains with their seed
    *(0.22, 0.23, 0.32, 0.23, 0.47, 0.21, 0.36, 0.30, 0.46, 0.25, 0.30, 0.30, 0.27, 0.20, 0.33),
    *(0.23, 0.38, 0.22, 0.29, 0.33, 0.47, 0.23, 0.24, 0.44, 0.21, 0.47, 0.37, 0.28, 0.45, 0.43),
)
DOMAINS = ("books", "games", "toys")


@pytest.fixture(scope="module", params=["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def engine(request) -> Iterator[Engine]:
    if request.param == "spark":
        pytest.importorskip("pyspark")
    with open_engine(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def duck() -> Iterator[Engine]:
    with open_engine("duckdb") as opened:
        yield opened


def md5(*parts: object) -> str:
    return hashlib.md5("\x1f".join(map(str, parts)).encode()).hexdigest()


def click(user: str, item: str, domain: int = 0, **columns: object) -> Row:
    columns = {"split": 0, "time": 0, "shop": f"shop of {item}", **columns}
    keys = {"__user_text": user, "__item_text": item, "__domain": domain, "__label": 1, "__split": columns.pop("split")}
    return {"user": user, "item": item, **columns, **keys, "__hash": md5(user, item, domain)}


def table(engine: Engine, rows: Sequence[Row], files: int = 1) -> Any:
    """Rows as a table of an engine, dealt out to files."""
    kinds = {
        "__domain": pa.int32(),
        "__label": pa.int32(),
        "__split": pa.int32(),
        "time": pa.int64(),
        "__order": pa.int64(),
    }
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in rows[0]])
    paths = []
    for number in range(files):
        paths.append(engine.work / f"clicks-{len(list(engine.work.iterdir())):05d}-{number}.parquet")
        pq.write_table(pa.Table.from_pylist(rows[number::files], schema=schema), paths[-1])
    return engine.read(paths)


def added(
    engine: Engine, rows: Sequence[Row], plan: Negatives, files: int = 1, domains: Sequence[str] = DOMAINS
) -> list[Row]:
    """The sampled rows, in an order of their own."""
    drawn = sampled(engine, table(engine, rows, files), plan, domains, ["shop"], item="item")
    found = [row for batch in engine.batches(drawn) for row in batch.to_pylist()]
    assert all(list(row) == list(rows[0]) for row in found)
    return sorted(found, key=lambda row: (row["__domain"], row["__user_text"], row["__hash"]))


def pairs(rows: Sequence[Row]) -> Counter[tuple[int, str, str]]:
    return Counter((row["__domain"], row["__user_text"], row["__item_text"]) for row in rows)


# --- the definition, in plain Python ------------------------------------------------------------------------------------


def order(row: Row) -> list[Any]:
    rest = [row[name] for name in sorted(row) if name != "__hash"]
    return [row["__hash"], *((value is None, 0 if value is None else value) for value in rest)]


def wanted_of(plan: Negatives, clicks: int, domain: int, domains: Sequence[str]) -> int:
    if plan.rule == "paper":
        draw = random.Random(plan.seed)
        shares = [draw.uniform(0.2, 0.5) for _ in domains]
        share = round(shares[domain], 2) if plan.rounded else shares[domain]
        return math.floor(clicks / plan.ratios.get(domains[domain], share))
    return math.floor(clicks * plan.ratios.get(domains[domain], plan.ratio) + 0.5)


def mixed(key: int, number: int) -> int:
    """SplitMix64."""
    bits = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def items_of(key: int, own: set[str], pool: Counter[str], wanted: int, popularity: bool) -> list[str]:
    """The items of one user in one domain, in the order in which they come."""
    slots = [item for item in sorted(pool) for _ in range(pool[item] if popularity else 1)]
    wanted, found = min(wanted, len(pool) - len(own)), dict[str, None]()
    draws = len(pool) if 2 * (wanted + len(own)) > len(pool) else wanted + wanted // 16 + 1
    while draws < len(pool) and len(found) < wanted:
        items = [slots[mixed(key, number) % len(slots)] for number in range(draws)]
        found, draws = dict.fromkeys(item for item in items if item not in own), 4 * draws
    race = {}
    for place, item in enumerate(sorted(pool)):
        number = mixed(key, 2**40 + place)
        race[item] = -math.log((number // 16 + 0.5) / 2**60) / pool[item] if popularity else number
    return [*found, *sorted(set(pool) - own - set(found), key=race.__getitem__)][:wanted]


def expected(rows: Sequence[Row], plan: Negatives, domains: Sequence[str] = DOMAINS) -> list[Row]:
    clicks, pools, firsts = defaultdict(list), defaultdict(Counter), {}
    for row in sorted(rows, key=order):
        clicks[row["__domain"], row["__user_text"]].append(row)
        pools[row["__domain"]][row["__item_text"]] += 1
        firsts.setdefault((row["__domain"], row["__item_text"]), row)
    found = []
    for (domain, user), own in clicks.items():
        avoided = {row["__item_text"] for row in own if plan.exclude == "all" or row["__split"] == 0}
        key = int(md5(plan.seed, domains[domain], user)[:15], 16)
        wanted = wanted_of(plan, len(own), domain, domains)
        items = items_of(key, avoided, pools[domain], wanted, plan.rule == "popularity")
        for rank, item in enumerate(items):
            of_item = {name: firsts[domain, item][name] for name in ("item", "shop", "__item_text")}
            fixed = {"__label": 0, "__hash": f"{mixed(key, 2**41 + rank) // 16:015x}"}
            found.append({**own[rank % len(own)], **of_item, **fixed})
    return sorted(found, key=lambda row: (row["__domain"], row["__user_text"], row["__hash"]))


def log(users: int, items: int, clicks: int, seed: int, domains: int = 2) -> list[Row]:
    """Some items are clicked far more often than others; nobody clicks one twice in a domain."""
    draw = random.Random(seed)
    weights = [1 / (1 + place) for place in range(items)]
    rows = []
    for user in range(users):
        for domain in range(domains):
            chosen = set(draw.choices(range(items), weights, k=draw.randint(1, clicks)))
            for item in sorted(chosen):
                columns = {"split": draw.choice((0, 0, 1, 2)), "time": draw.randrange(1000)}
                rows.append(click(f"u{user}", f"i{item:03d}", domain, **columns))
    draw.shuffle(rows)
    return rows


PLANS = [
    Negatives("paper"),
    Negatives("paper", rounded=False, seed=5, exclude="train"),
    Negatives("paper", ratios={"games": 0.1}),
    Negatives("uniform", ratio=1.5),
    Negatives("uniform", ratios={"books": 0.5}, exclude="train"),
    Negatives("popularity", ratio=3),
    Negatives("popularity", ratio=6, exclude="train", seed=9),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.rule}-{plan.exclude}-{plan.seed}")
@pytest.mark.parametrize("shape", [(40, 12, 5), (60, 150, 8)], ids=["small-pool", "large-pool"])
def test_sampled_rows_are_the_documented_ones(duck, plan, shape) -> None:
    rows = log(*shape, seed=2)
    found = added(duck, rows, plan)
    assert found == expected(rows, plan)
    assert len(found) > len(rows) / 4


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=3) | st.sampled_from("abcdefghij")
CLICKS = st.tuples(
    WORDS, WORDS, st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.none() | st.sampled_from("xy")
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(CLICKS, min_size=8, max_size=60),
    plan=st.builds(
        Negatives,
        rule=st.sampled_from(["paper", "uniform", "popularity"]),
        ratio=st.floats(0.4, 8),
        exclude=st.sampled_from(["all", "train"]),
        seed=st.integers(-5, 5),
    ),
)
def test_any_log_gets_the_documented_rows(duck, rows, plan) -> None:
    clicks = [click(u, i, domain, split=split, time=time, shop=shop) for u, i, domain, split, time, shop in rows]
    wanted = expected(clicks, plan)
    if wanted:
        assert added(duck, clicks, plan) == wanted
    else:
        with pytest.raises(DataError, match="no non-click can be sampled"):
            added(duck, clicks, plan)


def test_hashes_may_be_numbers(duck) -> None:
    rows = log(30, 60, 6, seed=3)
    texts = added(duck, rows, Negatives("paper"))
    both = [{**row, "__order": int(row["__hash"][:15], 16)} for row in rows]
    assert added(duck, both, Negatives("paper")) == [{**row, "__order": int(row["__hash"], 16)} for row in texts]
    clicks = table(duck, both).drop("__hash")
    drawn = sampled(duck, clicks, Negatives("paper"), DOMAINS, ["shop"], item="item")
    found = [row["__order"] for batch in duck.batches(drawn) for row in batch.to_pylist()]
    assert drawn.columns == clicks.columns
    assert sorted(found) == sorted(int(row["__hash"], 16) for row in texts)


@pytest.mark.parametrize("rule", ["paper", "popularity"])
def test_order_of_rows_and_number_of_files_do_not_matter(duck, rule) -> None:
    rows = log(50, 60, 6, seed=3)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert added(duck, rows, Negatives(rule)) == added(duck, shuffled, Negatives(rule), files=3)


def test_other_domains_do_not_matter(duck) -> None:
    plan, rows = Negatives("uniform", ratio=2), log(30, 40, 5, seed=4)
    alone = added(duck, [row for row in rows if row["__domain"] == 1], plan)
    assert alone == [row for row in added(duck, rows, plan) if row["__domain"] == 1]


@pytest.mark.spark
def test_spark_and_duckdb_sample_the_same_rows(duck) -> None:
    pytest.importorskip("pyspark")
    rows = log(400, 200, 12, seed=6, domains=3)
    with open_engine("spark") as spark:
        for plan in PLANS:
            assert added(spark, rows, plan, files=2) == added(duck, rows, plan)


# --- how many -----------------------------------------------------------------------------------------------------------


def test_shares_of_the_paper() -> None:
    names = [str(number) for number in range(30)]
    assert click_shares(Negatives("paper"), names) == PUBLISHED
    exact = click_shares(Negatives("paper", rounded=False), names)
    assert exact != PUBLISHED
    assert tuple(round(share, 2) for share in exact) == PUBLISHED
    assert click_shares(Negatives("paper", ratios={"1": 0.4}), names) == (0.22, 0.4, *PUBLISHED[2:])


def test_users_get_what_the_papers_loop_gives_them(duck) -> None:
    rows = log(80, 300, 9, seed=7, domains=3)
    counts = Counter((row["__domain"], row["__user_text"]) for row in rows)
    found = Counter((row["__domain"], row["__user_text"]) for row in added(duck, rows, Negatives("paper")))
    assert found == {key: math.floor(clicks / PUBLISHED[key[0]]) for key, clicks in counts.items()}


def test_ratios_round_to_the_nearest_and_halves_up(duck) -> None:
    others = [*(click("v", f"j{n}") for n in range(9)), click("one", "a", 1), click("two", "b", 1)]
    rows = [*(click("u", f"i{n}") for n in range(3)), *others]
    for ratio, size in ((0.1, 0), (0.5, 2), (1.4, 4), (1.5, 5), (2, 6)):
        found = added(duck, rows, Negatives("uniform", ratio=1, ratios={"books": ratio}))
        assert sum(row["__user_text"] == "u" for row in found) == size


def test_nobody_gets_more_than_there_is(duck) -> None:
    rows = [click("greedy", f"i{n}") for n in range(9)] + [click("modest", "i9"), click("all", "i0", 1)]
    for rule in ("paper", "uniform", "popularity"):
        found = pairs(added(duck, rows, Negatives(rule, ratio=50, ratios={"books": 0.01 if rule == "paper" else 50})))
        assert found == Counter([(0, "greedy", "i9"), *((0, "modest", f"i{n}") for n in range(9))])


def test_nothing_to_sample_is_an_error(duck) -> None:
    with pytest.raises(DataError, match="no non-click can be sampled"):
        added(duck, [click("u", "i"), click("v", "i")], Negatives("uniform"))
    with pytest.raises(DataError, match="no non-click can be sampled"):
        added(duck, [click("u", "i"), click("v", "j")], Negatives("uniform", ratio=0.4))


def test_a_ratio_of_an_unknown_domain_is_an_error(duck) -> None:
    with pytest.raises(ConfigError, match=r"must name domains. Received: 'book'\. Did you mean 'books'"):
        added(duck, [click("u", "i"), click("v", "j")], Negatives("uniform", ratios={"book": 2}))


# --- which --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.rule}-{plan.exclude}-{plan.seed}")
def test_no_own_item_none_twice_and_all_of_the_domain(duck, plan) -> None:
    rows = log(60, 50, 9, seed=8)
    found = pairs(added(duck, rows, plan))
    assert max(found.values()) == 1
    assert not set(found) & set(pairs([row for row in rows if plan.exclude == "all" or row["__split"] == 0]))
    assert {(domain, item) for domain, _, item in found} <= {(domain, item) for domain, _, item in pairs(rows)}


def test_exclude_train_avoids_clicks_of_train_alone(duck) -> None:
    rows = [click("u", "a"), click("u", "b", split=2), click("v", "c")]
    found = {row["item"] for row in added(duck, rows, Negatives(ratio=5, exclude="train")) if row["user"] == "u"}
    assert found == {"b", "c"}
    unsplit = [{name: row[name] for name in row if name != "__split"} for row in rows]
    for plan in (Negatives(ratio=5), Negatives(ratio=5, exclude="train")):
        assert {row["item"] for row in added(duck, unsplit, plan) if row["user"] == "u"} == {"c"}


def test_a_non_click_follows_its_click(duck) -> None:
    """Columns of the user's clicks come in turn, those of the item from the item."""
    rows = log(20, 40, 6, seed=9)
    clicks = defaultdict(list)
    for row in sorted(rows, key=order):
        clicks[row["__domain"], row["__user_text"]].append((row["time"], row["__split"]))
    found = added(duck, rows, Negatives("uniform", ratio=2))
    followed = defaultdict(Counter)
    for row in found:
        followed[row["__domain"], row["__user_text"]][row["time"], row["__split"]] += 1
        assert row["shop"] == f"shop of {row['__item_text']}"
        assert (row["item"], row["__label"]) == (row["__item_text"], 0)
    for key, of_user in followed.items():
        assert of_user == Counter(clicks[key] * 2)
    assert len({row["__hash"] for row in found}) == len(found)


def drawn_sets(engine: Engine, rows: list[Row], plan: Negatives) -> Counter[tuple[str, ...]]:
    """Which items each user ``u...`` got."""
    got = defaultdict(list)
    for row in added(engine, rows, plan):
        got[row["__user_text"]].append(row["__item_text"])
    return Counter(tuple(sorted(items)) for user, items in got.items() if user.startswith("u"))


@pytest.mark.parametrize(
    "clicks", [[1, 2, 3, 6], [3] * 20 + [60, 20, 9], [1] * 8 + [60]], ids=["ranked", "drawn", "drawn-and-ranked"]
)
def test_popular_items_are_as_likely_as_they_are_clicked(duck, clicks) -> None:
    """Two items for each user, one after the other, in proportion to the clicks of what is left."""
    items = [f"i{n:02d}" for n in range(len(clicks))]
    mine = dict(enumerate(random.Random(3).choices(items, clicks, k=12_000)))
    weights, likely = Counter(mine.values()), Counter[tuple[str, ...]]()
    for own, users in weights.items():
        left = sum(weights.values()) - users
        for one, two in permutations(set(weights) - {own}, 2):
            likely[min(one, two), max(one, two)] += users * weights[one] / left * weights[two] / (left - weights[one])
    rows = [click(f"u{number}", item) for number, item in mine.items()]
    found = drawn_sets(duck, rows, Negatives("popularity", ratio=2))
    assert set(found) <= set(likely)
    common = [sets for sets, users in likely.items() if users > 8]
    observed, wanted = [found[sets] for sets in common], [likely[sets] for sets in common]
    rest = sum(likely.values()) - sum(wanted)
    if rest > 8:
        observed, wanted = [*observed, sum(found.values()) - sum(observed)], [*wanted, rest]
    scale = sum(observed) / sum(wanted)  # a rest too small to test is left out on both sides
    assert scale == pytest.approx(1, abs=1e-3)
    assert chisquare(observed, [users * scale for users in wanted]).pvalue > 1e-3


def test_items_are_spread_as_in_the_papers_loop(duck) -> None:
    """User by user: the domain's items without the user's own, of which a sample."""
    rows, draw = log(3_000, 60, 6, seed=10, domains=1), random.Random(0)
    pool, own, looped = {row["item"] for row in rows}, defaultdict(set), Counter[str]()
    for row in rows:
        own[row["user"]].add(row["item"])
    for items in own.values():
        candidates = sorted(pool - items)
        looped.update(draw.sample(candidates, min(math.floor(len(items) / 0.22), len(candidates))))
    ours = Counter(row["item"] for row in added(duck, rows, Negatives("paper")))
    assert sum(ours.values()) == sum(looped.values())
    counts = [[of[item] for item in sorted(pool)] for of in (ours, looped)]
    assert chi2_contingency(counts).pvalue > 1e-3
    assert max(ours.values()) > 1.2 * min(ours.values())  # popular items are seldom left to draw, in both


# --- never silently other rows ------------------------------------------------------------------------------------------

TINY = [
    click("ann", "dune", time=1),
    click("ann", "emma", time=2),
    click("bob", "emma", time=3, split=1),
    click("cy", "ilias", time=4, split=2),
    click("dee", "ulysses", time=5),
    click("ann", "chess", 1, time=6),
    click("bob", "go", 1, time=7),
    click("bob", "poker", 1, time=8),
    click("cy", "tennis", 1, time=9),
    click("ann", "doll", 2, time=10, split=1),
    click("ann", "kite", 2, time=11, split=2),
    *(click("eve", f"toy {number}", 2, time=12 + number) for number in range(40)),
]
GOLDEN: dict[str, list[tuple[Any, ...]]] = {
    "paper": [
        (0, "ann", "ulysses", 2, 0, "82fd8b14"),
        (0, "ann", "ilias", 1, 0, "aaf64eb8"),
        (0, "bob", "dune", 3, 1, "02696e92"),
        (0, "bob", "ilias", 3, 1, "f7229a18"),
        (0, "bob", "ulysses", 3, 1, "fb647f08"),
        (0, "cy", "emma", 4, 2, "46df0fe7"),
        (0, "cy", "dune", 4, 2, "935683bb"),
        (0, "cy", "ulysses", 4, 2, "b6934cae"),
        (0, "dee", "dune", 5, 0, "0e3a95fc"),
        (0, "dee", "ilias", 5, 0, "2d94b140"),
        (0, "dee", "emma", 5, 0, "49728fcf"),
        (1, "ann", "go", 6, 0, "2502bc0e"),
        (1, "ann", "tennis", 6, 0, "cf1b5f06"),
        (1, "ann", "poker", 6, 0, "d4b7b498"),
        (1, "bob", "chess", 7, 0, "62380e72"),
        (1, "bob", "tennis", 8, 0, "bdddf485"),
        (1, "cy", "go", 9, 0, "8c5315ec"),
        (1, "cy", "poker", 9, 0, "cf195c8a"),
        (1, "cy", "chess", 9, 0, "d074b174"),
        (2, "ann", "toy 28", 11, 2, "1fcba0ac"),
        (2, "ann", "toy 24", 11, 2, "4c62b791"),
        (2, "ann", "toy 31", 10, 1, "597d7116"),
        (2, "ann", "toy 15", 10, 1, "7669ac30"),
        (2, "ann", "toy 22", 10, 1, "c58c3476"),
        (2, "ann", "toy 2", 11, 2, "ee90c71b"),
        (2, "eve", "doll", 27, 0, "853d1be1"),
        (2, "eve", "kite", 44, 0, "b8f731a9"),
    ],
    "uniform": [
        (0, "ann", "ulysses", 2, 0, "82fd8b14"),
        (0, "ann", "ilias", 1, 0, "aaf64eb8"),
        (0, "bob", "dune", 3, 1, "02696e92"),
        (0, "cy", "dune", 4, 2, "935683bb"),
        (0, "dee", "emma", 5, 0, "0e3a95fc"),
        (1, "ann", "poker", 6, 0, "d4b7b498"),
        (1, "bob", "chess", 7, 0, "62380e72"),
        (1, "bob", "tennis", 8, 0, "bdddf485"),
        (1, "cy", "poker", 9, 0, "8c5315ec"),
        (2, "ann", "toy 24", 11, 2, "4c62b791"),
        (2, "ann", "toy 31", 10, 1, "597d7116"),
        (2, "eve", "doll", 27, 0, "853d1be1"),
        (2, "eve", "kite", 44, 0, "b8f731a9"),
    ],
    "popularity": [
        (0, "ann", "ilias", 2, 0, "82fd8b14"),
        (0, "ann", "ulysses", 1, 0, "aaf64eb8"),
        (0, "bob", "ilias", 3, 1, "02696e92"),
        (0, "cy", "emma", 4, 2, "935683bb"),
        (0, "dee", "dune", 5, 0, "0e3a95fc"),
        (1, "ann", "go", 6, 0, "d4b7b498"),
        (1, "bob", "tennis", 7, 0, "62380e72"),
        (1, "bob", "chess", 8, 0, "bdddf485"),
        (1, "cy", "poker", 9, 0, "8c5315ec"),
        (2, "ann", "toy 24", 11, 2, "4c62b791"),
        (2, "ann", "toy 31", 10, 1, "597d7116"),
        (2, "eve", "kite", 27, 0, "853d1be1"),
        (2, "eve", "doll", 44, 0, "b8f731a9"),
    ],
}


@pytest.mark.parametrize("rule", ["paper", "uniform", "popularity"])
def test_golden(engine, rule) -> None:
    found = added(engine, TINY, Negatives(rule, ratio=1))
    names = ("__domain", "user", "item", "time", "__split")
    assert [(*(row[name] for name in names), row["__hash"][:8]) for row in found] == GOLDEN[rule]
