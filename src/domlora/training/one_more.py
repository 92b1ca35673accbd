"""A bundle with room for one domain more, before anything is learned."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import torch
from torch import nn

from domlora.adapters.attach import attach_
from domlora.adapters.bank import add_domain_, base_state, is_adapter_parameter
from domlora.bundle import Bundle
from domlora.errors import SchemaError, UnknownDomainError, nearest
from domlora.features.encode import Encoder
from domlora.features.schema import Schema
from domlora.models.build import build_model, stored_options
from domlora.models.growth import grown
from domlora.training.new_rows import EncodedRows
from domlora.training.stages import Recipe, with_vectors

__all__ = ["check_base", "same_base", "with_domain", "with_row", "with_words"]


def with_domain(known: Encoder, data: Encoder, domain: str) -> tuple[Encoder, int]:
    """The bundle's encoder with the domain, and its number there."""
    if domain not in data.schema.domains:
        raise UnknownDomainError(
            "the data must have the domain", received=domain, next_step=nearest(domain, data.schema.domains)
        )
    domains = known.schema.domains
    if domain in domains:
        return known, domains.index(domain)
    return Encoder(replace(known.schema, domains=(*domains, domain)), known.vocabularies), len(domains)


def with_words(bundle: Bundle, data: EncodedRows) -> Bundle:
    """The bundle with the words of the data, but not their domains; a new word is scored as an unknown one."""
    old, options = bundle.encoder.schema, with_vectors(bundle.model_options, data)
    schema = replace(old, features=data.encoder.schema.features)
    encoder = Encoder(schema, data.encoder.vocabularies)
    return replace(bundle, model=grown(bundle.model, options, old, schema), model_options=options, encoder=encoder)


def check_base(bundle: Bundle, schema: Schema) -> None:
    """Refuse a model that one domain more would give another base; it is built without memory to see that."""
    options = stored_options(bundle.model_options)
    with torch.device("meta"):
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in base_state(build_model(schema=each, **options)).items()}
            for each in (bundle.encoder.schema, schema)
        ]
    differing = sorted(name for name in shapes[1] if shapes[0].get(name) != shapes[1][name])
    if differing:
        raise SchemaError(
            f"model {options['name']!r} has weights of each domain in its base, so its base cannot take one more",
            received=differing[:3],
            next_step="Train it with all domains, or onboard into a model whose base is shared",
        )


def with_row(bundle: Bundle, number: int, recipe: Recipe) -> nn.Module:
    """The bundle's model with adapters, and a row for the domain."""
    model = same_base(bundle.model)
    num_domains = bundle.encoder.schema.num_domains
    if bundle.adapter is None:
        attach_(model, num_domains, **asdict(recipe.adapter))
    if number == num_domains:
        add_domain_(model)
    return model.eval()


def same_base(model: nn.Module) -> nn.Module:
    """A copy that holds the same memory for the base, but says for itself what requires a gradient."""
    base = [p for name, p in model.named_parameters() if not is_adapter_parameter(name)]
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in base})
