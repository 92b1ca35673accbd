"""Changing what is served, over HTTP: adapters, the live version, and Triton's repository extension for both.

``GET PUT DELETE /v1/adapters/DOMAIN``, ``GET /v1/adapters``, ``GET POST /v1/bundle``, ``POST /v2/repository/index`` and
``POST /v2/repository/models/NAME/load|unload``, where NAME is the model itself or, for a domain's adapter, ``MODEL.DOMAIN``.
Handlers write to disk and wait for it: they are run in a thread.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from domlora.errors import BundleError, ConfigError, DataError, DomloraError, UnknownDomainError, nearest
from domlora.serving.http.answers import (
    Answer,
    NotFoundError,
    Request,
    UnavailableError,
    json_answer,
    json_object,
    refusal,
)
from domlora.serving.http.service import Service
from domlora.serving.live import Source
from domlora.serving.state import State

__all__ = ["handle", "handles", "refused", "takes_adapter"]

_LOG = logging.getLogger("domlora.serving")
_ADAPTERS, _BUNDLE, _INDEX, _MODELS = "/v1/adapters", "/v1/bundle", "/v2/repository/index", "/v2/repository/models/"
_HERE = re.compile(rb"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_FILE = "file:"
_BOOLEANS = {"true": True, "1": True, "": True, "false": False, "0": False}


class _Bundle(msgspec.Struct, forbid_unknown_fields=True):
    version: int


class _Index(msgspec.Struct):
    ready: bool = False


class _Load(msgspec.Struct):
    parameters: dict[str, str | int | bool | float] = {}


def handles(path: str) -> bool:
    """Whether a path is one of ours.

    >>> handles("/v1/adapters/toys"), handles("/v1/score")
    (True, False)
    """
    return path in (_ADAPTERS, _BUNDLE, _INDEX) or path.startswith((f"{_ADAPTERS}/", _MODELS))


def takes_adapter(request: Request) -> bool:
    """Whether its body is an adapter, which may be larger than other bodies."""
    return request.method == "PUT" and request.path.startswith(f"{_ADAPTERS}/")


def handle(service: Service, request: Request) -> Answer:
    """Answer a request to one of our paths, after a look at who asks."""
    no = refused(service, request)
    if no is not None:
        return no
    try:
        return _handler(request)(service, request)
    except DataError as error:
        if isinstance(error.__cause__, OSError):  # a full disk is no fault of the client's
            return refusal(UnavailableError("the store cannot be written", next_step="Make room on the server's disk"))
        return refusal(error)
    except DomloraError as error:
        return refusal(error)


def refused(service: Service, request: Request) -> Answer | None:
    """The answer for who may not change anything, None for who may.

    With a token whoever has it may. Without one only who is on this machine, and no page of another site that a browser
    on this machine shows: its requests say where they come from, or for which host they were meant.
    """
    settings, headers = service.settings, request.headers
    if not settings.admin_allowed:
        return _no(403, "admin routes are off: the server has no token", "Start it with --token")
    if settings.token is not None:
        given = headers.get(b"authorization")
        if given is None:
            return _no(401, "this route needs a token", "Send Authorization: Bearer TOKEN")
        if not hmac.compare_digest(given, b"Bearer " + settings.token.encode()):
            return _no(403, "this is not the server's token", "Send Authorization: Bearer TOKEN")
        return None
    host, origin = headers.get(b"host", b"localhost"), headers.get(b"origin")
    if not _HERE.fullmatch(host) or (origin is not None and origin.partition(b"//")[2] != host):
        return _no(403, "without a token admin routes are for this machine only", "Start the server with --token")
    return None


def _no(status: int, error: str, next_step: str) -> Answer:
    asks = ((b"www-authenticate", b"Bearer"),) if status == 401 else ()
    return json_answer({"error": f"{error}.", "next_step": f"{next_step}."}, status, asks)


def _handler(request: Request) -> Callable[[Service, Request], Answer]:
    path, method = request.path, request.method
    routes: dict[str, dict[str, Callable[[Service, Request], Answer]]] = {
        _ADAPTERS: {"GET": _list},
        _BUNDLE: {"GET": _versions, "POST": _set_live},
        _INDEX: {"POST": _index},
    }
    found = routes.get(path)
    if found is None and path.startswith(_MODELS):
        found = {"POST": _load if path.endswith("/load") else _unload} if path.endswith(("/load", "/unload")) else {}
    elif found is None:
        found = {"GET": _get, "PUT": _put, "DELETE": _delete}
    if method not in found:
        raise NotFoundError(
            "no such route", received=f"{method} {path[:200]}", next_step=f"Methods: {', '.join(found)}"
        )
    return found[method]


def _check_own(service: Service) -> None:
    """A copy must not be changed: other replicas would not have the change, and this one would lose it."""
    if service.settings.store_url is not None:
        raise ConfigError(
            "this server has a copy of a shared store, which is changed by publishing to it",
            next_step="Run domlora store publish STORE URL where the store is",
        )


def _list(service: Service, _: Request) -> Answer:
    """All domains, and what was taken away."""
    state, known = service.live.store.state(), service.live.known()
    adapters = [_said(service, state, domain, source) for domain, source in sorted(known.items())]
    what = {"bundle": service.live.current.version, "adapters": adapters, "removed": sorted(state.removed)}
    return json_answer({**what, "max_adapters": service.settings.max_adapters})


def _get(service: Service, request: Request) -> Answer:
    domain = _domain(request)
    return json_answer(_said(service, service.live.store.state(), domain, _known(service, domain)))


def _put(service: Service, request: Request) -> Answer:
    """Serve an adapter: the body is the file that ``domlora store pack`` writes."""
    version, pinned = request.query.get("version"), _flag(request.query.get("pinned"))
    return json_answer(_pushed(service, _domain(request), request.body, version, pinned))


def _delete(service: Service, request: Request) -> Answer:
    _check_own(service)
    domain = _domain(request)
    service.live.store.drop_adapter(domain)
    _refresh(service)
    return json_answer({"domain": domain, "served": False})


def _versions(service: Service, _: Request) -> Answer:
    state = service.live.store.state()
    return json_answer({"version": state.live, "versions": service.live.store.versions()})


def _set_live(service: Service, request: Request) -> Answer:
    _check_own(service)
    version = json_object(request.body, msgspec.json.Decoder(_Bundle), lambda _: 1).version
    service.live.store.set_live(version)
    _refresh(service)
    if service.live.current.version != str(version):
        raise UnavailableError("the version is live, and this process cannot read it yet", next_step="Its log says why")
    return json_answer({"version": version, "versions": service.live.store.versions()})


def _index(service: Service, request: Request) -> Answer:
    """The model's versions, and a model for each domain."""
    ready_only = json_object(request.body or b"{}", msgspec.json.Decoder(_Index), lambda _: 1).ready
    live, name = service.live, service.live.current.name
    state, current = live.store.state(), live.current.version
    models = [
        _model(name, str(number), "" if str(number) == current else "it is not the live version")
        for number in live.store.versions()
    ]
    models += [_model(f"{name}.{domain}", source.version) for domain, source in sorted(live.known().items())]
    models += [_model(f"{name}.{domain}", "", "unloaded") for domain in sorted(state.removed)]
    return json_answer([model for model in models if model["state"] == "READY" or not ready_only])


def _load(service: Service, request: Request) -> Answer:
    """Look for what is new; serve a domain again; or, with a file among the parameters, push an adapter."""
    body = request.body or b"{}"
    told = json_object(body, msgspec.json.Decoder(_Load), lambda load: 1 + len(load.parameters)).parameters
    domain = _domain_of_model(service, request)
    files = [value for key, value in told.items() if key.startswith(_FILE)]
    if domain is None:
        _refresh(service)
    elif not files:
        _check_own(service)
        service.live.store.load(domain)
        _refresh(service)
    else:
        version = told.get("version")
        pinned = told.get("pinned") is True
        _pushed(service, domain, _decoded(files), None if version is None else str(version), pinned)
    return json_answer({})


def _unload(service: Service, request: Request) -> Answer:
    """Stop serving a domain; its adapter stays in the store."""
    domain = _domain_of_model(service, request)
    if domain is None:
        raise ConfigError("the model itself must stay loaded", next_step="Unload a domain: MODEL.DOMAIN")
    _check_own(service)
    service.live.store.unload(domain)
    _refresh(service)
    return json_answer({})


def _pushed(service: Service, domain: str, content: bytes, version: str | None, pinned: bool) -> dict[str, Any]:
    _check_own(service)
    settings, store = service.settings, service.live.store
    if pinned:
        others = sum(each.pinned for name, each in store.state().adapters.items() if name != domain)
        if others >= settings.max_adapters:
            raise ConfigError(
                f"at most {settings.max_adapters} adapters may be pinned", next_step="Raise --max-adapters, or drop one"
            )
    adapter = store.put_adapter(domain, content, version, pinned, max_rank=settings.max_rank)
    _refresh(service)
    source = service.live.known().get(domain)
    if source is None or source.sha256 != adapter.sha256:  # or somebody else has pushed the next one
        _LOG.warning("pushed adapter is not the one served", extra={"fields": {"domain": domain}})
    fields = ("domain", "version", "pinned", "sha256", "size_bytes", "rank")
    return {name: getattr(adapter, name) for name in fields}


def _refresh(service: Service) -> None:
    """Serve in this process what was changed, before the answer says so; other processes look for it themselves."""
    try:
        if service.live.refresh():
            service.metrics.swapped()
    except DomloraError as error:
        _LOG.error("not refreshed", extra={"fields": {"reason": str(error)}})


def _said(service: Service, state: State, domain: str, source: Source) -> dict[str, Any]:
    pushed = state.adapters.get(domain) if source.pushed else None
    more = {} if pushed is None else {"rank": pushed.rank, "size_bytes": pushed.size_bytes, "sha256": pushed.sha256}
    return {
        "domain": domain,
        "version": source.version,
        "pushed": source.pushed,
        "pinned": source.pinned,
        "in_memory": domain in service.live.resident(),
        **more,
    }


def _model(name: str, version: str, reason: str = "") -> dict[str, str]:
    return {"name": name, "version": version, "state": "UNAVAILABLE" if reason else "READY", "reason": reason}


def _domain(request: Request) -> str:
    return request.path[len(_ADAPTERS) + 1 :]


def _domain_of_model(service: Service, request: Request) -> str | None:
    """The domain that ``MODEL.DOMAIN`` names, None for the model itself."""
    name, model = request.path[len(_MODELS) :].rpartition("/")[0], service.live.current.name
    if name == model:
        return None
    if not name.startswith(f"{model}."):
        raise NotFoundError("no such model", received=name[:200], next_step=f"Known: {model} and {model}.DOMAIN")
    return name[len(model) + 1 :]


def _known(service: Service, domain: str) -> Source:
    known: Mapping[str, Source] = service.live.known()
    if domain not in known:
        raise UnknownDomainError(
            "no such domain is served", received=domain[:200], next_step=nearest(domain[:100], [*known][:200])
        )
    return known[domain]


def _flag(text: str | None) -> bool:
    if text is not None and text.lower() not in _BOOLEANS:
        raise DataError("pinned must be true or false", received=text[:100])
    return False if text is None else _BOOLEANS[text.lower()]


def _decoded(files: list[Any]) -> bytes:
    """The one file among a load's parameters."""
    try:
        if len(files) != 1:
            raise ValueError(f"{len(files)} files")
        return base64.b64decode(files[0], validate=True)
    except (ValueError, TypeError, binascii.Error) as error:
        raise BundleError(
            f"an adapter must be one file in base64 ({error})", next_step="Pass files={'file:1/adapter': CONTENT}"
        ) from error
