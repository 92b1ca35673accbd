"""One domain of a bundle as a plain model."""

from __future__ import annotations

import copy

from domlora.adapters.attach import merge_
from domlora.adapters.bank import base_state
from domlora.bundle import Bundle
from domlora.errors import ConfigError, UnknownDomainError, nearest

__all__ = ["merge"]


def merge(bundle: Bundle, domain: str) -> Bundle:
    """A bundle whose model has one domain's adapter folded into its weights, and no adapters.

    It scores every row as that domain's rows were scored, which ``facts["merged"]`` says.

    Args:
        bundle: it stays as it is.
        domain: whose adapter.

    Raises:
        UnknownDomainError: no such domain.
        ConfigError: a model without adapters, or one of whose layers merging makes another kind, as STAR's.
    """
    domains = bundle.encoder.schema.domains
    if domain not in domains:
        raise UnknownDomainError("no such domain", received=domain, next_step=nearest(domain, domains))
    before = {name: tuple(tensor.shape) for name, tensor in base_state(bundle.model).items()}
    model = merge_(copy.deepcopy(bundle.model), domains.index(domain)).eval()
    after = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if before != after:
        raise ConfigError(
            "merging must leave a model of the same kind to be a bundle, and layers of this one become others",
            received=sorted(before.keys() ^ after.keys())[:3],
            next_step="Serve it with its adapters",
        )
    merged = {"domain": domain, "version": bundle.version}
    return Bundle(model, bundle.model_options, bundle.encoder, {**bundle.facts, "merged": merged})
