"""An encoder that grew: more words at the ends of its vocabularies, more domains behind the others, all else as it was."""

from __future__ import annotations

from dataclasses import replace

from domlora.errors import SchemaError
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema

__all__ = ["check_grown"]

_NEXT_STEP = "Prepare the new rows with: domlora prepare ... --grow BUNDLE"


def check_grown(old: Encoder, new: Encoder) -> None:
    """Refuse an encoder that is not ``old`` with more words and more domains, as ``prepare --grow`` makes one.

    Then every raw value that ``old`` knows has the same id in both, every domain the same number, and every number the same
    scale. Which columns hold label, user, time and weight may differ, since no id depends on them.

    Raises:
        SchemaError: a feature, a word, a domain or what unknown domains get is another one.

    Example:
        >>> old = Encoder(Schema((Feature("item", num_ids=4),), domains=("app",)), {"item": ["a", "b"]})
        >>> new = Encoder(Schema((Feature("item", num_ids=5),), domains=("app", "web")), {"item": ["a", "b", "c"]})
        >>> check_grown(old, new)
        >>> check_grown(new, old)
        Traceback (most recent call last):
        domlora.errors.SchemaError: a grown encoder must begin with the domains of the old one, in their order. ...
    """
    _check_schema(old.schema, new.schema)
    for name, words in old.vocabularies.items():
        _check_prefix(f"words of feature {name!r}", words, new.vocabularies[name])


def _check_schema(old: Schema, new: Schema) -> None:
    _check_prefix("domains", old.domains, new.domains)
    for what in ("domain", "unknown_domain"):
        if getattr(old, what) != getattr(new, what):
            raise SchemaError(
                f"a grown encoder must have the {what} {getattr(old, what)!r} of the old one",
                received=getattr(new, what),
                next_step=_NEXT_STEP,
            )
    names = [[feature.name for feature in schema.features] for schema in (old, new)]
    if names[0] != names[1]:
        raise SchemaError(
            f"a grown encoder must have the features of the old one, {names[0]}",
            received=names[1],
            next_step=_NEXT_STEP,
        )
    words = {feature.name for feature in old.features if feature.has_vocabulary}
    for before, after in zip(old.features, new.features, strict=True):
        _check_feature(before, after, grows=(before.share or before.name) in words)


def _check_feature(old: Feature, new: Feature, *, grows: bool) -> None:
    """All of a feature must be the same, but for how many ids a vocabulary gives it."""
    if new != (replace(old, num_ids=new.num_ids) if grows else old):
        raise SchemaError(f"feature {old.name!r} must be as it was, {old}", received=new, next_step=_NEXT_STEP)


def _check_prefix(what: str, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    if new[: len(old)] == old:
        return
    place = next((i for i, (one, two) in enumerate(zip(old, new, strict=False)) if one != two), len(new))
    raise SchemaError(
        f"a grown encoder must begin with the {what} of the old one, in their order",
        received=f"{new[place]!r} in place of {old[place]!r}" if place < len(new) else f"{len(new)} of {len(old)}",
        next_step=_NEXT_STEP,
    )
