"""What a colleague would point at in a dataset, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from domlora.data.dataset import SPLITS
from domlora.studies.describing.facts import Clicks, DomainFacts, FeatureFacts
from domlora.studies.describing.facts_text import percent

__all__ = ["remarks"]

MIN_CLICKS = 100
MAX_UNKNOWN = 0.2
MIN_ELSEWHERE = 0.5
MAX_RATIO = 3.0
_NAMED = 5

Found = list[tuple[str, str]]  # names, each with a detail


def remarks(
    total: DomainFacts, domains: Sequence[DomainFacts], features: Sequence[FeatureFacts], unknown_rows: int = 0
) -> tuple[str, ...]:
    """Sentences on what may surprise in training or in a figure; none if nothing does.

    * a split without rows, a domain without training rows, rows of unknown domains
    * a domain with one class in a split: it has no AUC there
    * a domain with fewer than 100 clicks
    * a click rate that differs by more than a factor of 3 between train and test, with intervals apart: not by chance
    * a domain with most of its users nowhere else, or no user in two domains
    * a feature with more than 20 % of its test values out of the vocabulary, or one that never changes in training

    Args:
        total: all domains.
        domains: the known ones, largest first.
        features: of the schema.
        unknown_rows: rows of unknown domains.
    """
    if not total.total.rows:
        return ("The dataset has no rows.",)
    found = [f"The {split} split has no rows." for split in SPLITS if not total.splits[split].rows]
    if unknown_rows:
        found.append(f"{unknown_rows:,} rows are of unknown domains, which have no adapter.")
    groups = [*_of_classes(total, domains), *_of_rates(domains)]
    found += [_sentence(what, names) for what, names in groups if names]
    found += _of_users(total, domains)
    found += [text for feature in features for text in _of_feature(feature, domains)]
    return tuple(found)


def _of_classes(total: DomainFacts, domains: Sequence[DomainFacts]) -> Iterator[tuple[str, Found]]:
    if total.splits["train"].rows:
        yield "no training rows", [(d.name, f"{d.total.rows:,} rows") for d in domains if not d.splits["train"].rows]
    for split in SPLITS:
        lone = [(d.name, _classes(d.splits[split])) for d in domains if d.splits[split].one_class]
        yield f"one class in {split}" + (", so no AUC there" if split != "train" else ""), lone
    few = [(d.name, f"{d.total.clicks:,}") for d in domains if d.total.clicks < MIN_CLICKS]
    yield f"fewer than {MIN_CLICKS} clicks in all", few


def _classes(clicks: Clicks) -> str:
    return f"{clicks.rows:,} rows, {'all' if clicks.clicks else 'no'} clicks"


def _of_rates(domains: Sequence[DomainFacts]) -> Iterator[tuple[str, Found]]:
    moved = [
        (d.name, f"{percent(d.splits['train'].rate)} to {percent(d.splits['test'].rate)}")
        for d in domains
        if _apart(d.splits["train"], d.splits["test"])
    ]
    yield f"a click rate in test that is more than {MAX_RATIO:g} times that in train, or less than a third", moved


def _apart(one: Clicks, other: Clicks) -> bool:
    """Whether rates differ by more than a factor, and by more than chance explains."""
    if one.rate is None or other.rate is None:
        return False
    low, high = sorted((one, other), key=lambda clicks: clicks.rate or 0.0)
    return (high.rate or 0.0) > MAX_RATIO * (low.rate or 0.0) and (high.low or 0.0) > (low.high or 0.0)


def _of_users(total: DomainFacts, domains: Sequence[DomainFacts]) -> Iterator[str]:
    if total.users is None or len(domains) < 2:
        return
    if total.users.elsewhere == 0:
        yield "Every user is in one domain alone: the domain is as good as a property of the user."
        return
    shares = [(d.name, d.users.elsewhere) for d in domains if d.users is not None and d.users.elsewhere is not None]
    alone = [(name, percent(1 - elsewhere)) for name, elsewhere in shares if elsewhere < MIN_ELSEWHERE]
    if alone:
        yield _sentence("most of their users nowhere else", alone)


def _of_feature(feature: FeatureFacts, domains: Sequence[DomainFacts]) -> Iterator[str]:
    if feature.constant:
        yield f"Feature {feature.name} is the same in every training row."
    unknown = feature.coverage["test"].unknown
    if unknown is not None and unknown > MAX_UNKNOWN:
        shares = [(d.features[feature.name]["test"].unknown or 0.0, d.name) for d in domains]
        most, where = max(shares)
        tail = f"; most in {where} ({percent(most)})" if len(shares) > 1 else ""
        yield f"Feature {feature.name}: {percent(unknown)} of its values in test are not in the vocabulary{tail}."


def _sentence(what: str, found: Found) -> str:
    """One sentence for all domains of which something is true, with the first few of them by name."""
    named = ", ".join(f"{name} ({detail})" for name, detail in found[:_NAMED])
    more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    subject = "1 domain has" if len(found) == 1 else f"{len(found):,} domains have"
    return f"{subject} {what}: {named}{more}."
