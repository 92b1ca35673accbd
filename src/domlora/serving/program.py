"""An exported model that answers: onnxruntime and numpy, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from domlora.errors import BundleError, ConfigError, DataError, UnknownDomainError, nearest
from domlora.features.schema import Schema
from domlora.serving.folder import MIXED, ONE, AdaptedLayer, adapter_file, read_manifest
from domlora.serving.rows.layout import LOOKUPS, RemoteTable, Source
from domlora.serving.rows.lookup import Lookup

__all__ = ["Banks", "Plan", "Program", "checked_banks", "read_banks"]

Plan = Literal["mixed", "by_domain"]
Banks = tuple[NDArray[np.float32], ...]

_ROWS_A_DOMAIN = 10  # from here on, a call for each domain costs less than gathering a bank for each row
_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)


class _Graphs(NamedTuple):
    """What all programs of one folder share."""

    schema: Schema
    layers: tuple[AdaptedLayer, ...]
    mixed: Any
    one: Any
    reads_domain: bool
    num_ids: NDArray[np.uint64]
    num_dense: int
    fed: tuple[str, ...]  # the inputs that take banks
    nothing: Banks  # the banks of a row without a domain
    lookup: Lookup | None  # of rows of tables that the graphs do not hold


class Program:
    """Rows of ids and numbers in, logits out, with the adapters it holds.

    Nothing about a program changes, so that threads may share it. Another adapter makes another program of the same
    sessions: to swap one under load, swap the reference to the program. A domain's number is its place in ``domains``.

    Example:
        >>> import tempfile, torch
        >>> from domlora.bundle import Bundle
        >>> from domlora.features.batch import Batch
        >>> from domlora.features.encode import Encoder
        >>> from domlora.features.schema import Feature
        >>> from domlora.models.build import build_model
        >>> from domlora.serving.export import export
        >>> schema = Schema((Feature("item", num_ids=4),), domains=("app", "web"))
        >>> options = {"name": "mlp", "hidden_units": [8]}
        >>> bundle = Bundle(build_model(schema=schema, **options), options, Encoder(schema, {"item": ["a", "b"]}))
        >>> rows = Batch(torch.tensor([[2], [3]]), torch.zeros(2, 0), torch.tensor([0, 1]), torch.zeros(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export(bundle, Path(folder) / "program", [rows])
        ...     program = Program.open(Path(folder) / "program")
        ...     program(rows.ids.numpy(), rows.dense.numpy(), rows.domain.numpy()).shape
        (2,)
    """

    def __init__(self, graphs: _Graphs, adapters: Mapping[str, Banks]) -> None:
        self._graphs, self._adapters = graphs, dict(adapters)
        self._banks = list(self._adapters.values())
        adapted = graphs.layers and not graphs.reads_domain
        self.domains: tuple[str, ...] = tuple(self._adapters) if adapted else graphs.schema.domains

    @classmethod
    def open(
        cls, folder: Path, *, threads: int = 1, domains: Collection[str] | None = None, rows: Source | None = None
    ) -> Self:
        """Read what :func:`domlora.serving.export.export` wrote, after checking every file of it.

        Args:
            folder: the directory. Its tables stay mapped: it must not be changed in place.
            threads: of one call; one for each worker is best where there are as many workers as cores.
            domains: whose adapters are read; None for all. A network that itself reads the domain has all in any case.
            rows: where rows of tables come from that the export does not hold; without it such a program answers nothing.

        Raises:
            BundleError: no such folder, or a file is missing, damaged or unknown.
        """
        manifest = read_manifest(folder)
        schema = Schema.load(folder / "schema.json")
        layers = tuple(AdaptedLayer(**layer) for layer in manifest["layers"])
        try:
            sessions = [_session(folder / name, threads) for name in (MIXED, ONE)[: 2 if layers else 1]]
        except Exception as error:  # onnxruntime raises errors of kinds of its own
            raise BundleError(f"an exported folder must be readable ({error})", received=str(folder)) from error
        every = domains is None or manifest["reads_domain"]
        wanted = schema.domains if every else [name for name in schema.domains if name in (domains or ())]
        graphs = _Graphs(
            schema,
            layers,
            sessions[0],
            sessions[-1],
            manifest["reads_domain"],
            np.array([feature.num_ids for feature in schema.slots], dtype=np.uint64),
            schema.num_dense,
            tuple(name for layer in layers for name in layer.shapes),
            _nothing(layers),
            _lookup(folder, manifest, threads, rows),
        )
        places = {name: place for place, name in enumerate(schema.domains)}
        read = {name: read_banks(folder / adapter_file(places[name])) for name in wanted} if layers else {}
        return cls(graphs, {name: checked_banks(layers, banks) for name, banks in read.items()})

    def __call__(
        self, ids: NDArray[Any], dense: NDArray[Any], domain: NDArray[Any] | int, *, plan: Plan | None = None
    ) -> NDArray[np.float32]:
        """The logit of each row.

        **Shape**: ``ids (B, S)`` int64, each within its own feature, ``dense (B, G)`` float32, ``domain (B,)`` int64 in
        [-1, len(domains)) to ``(B,)``; -1 is a row of no domain, which the base answers.

        Args:
            ids, dense, domain: the rows; an integer is the domain of all of them, and costs least.
            plan: gather each row's banks (``mixed``), or call the graph of one domain for each domain there is
                (``by_domain``); None for what costs less. The answers are the same.

        Raises:
            DataError: a shape, a type, an id or a number that the schema does not allow; nothing was computed.
            UnknownDomainError: a domain out of range.
        """
        self._check(ids, dense, domain)
        if not len(ids):
            return np.empty(0, dtype=np.float32)
        if isinstance(domain, int):
            if self._graphs.layers and plan != "mixed":
                return self._of_one(ids, dense, domain)
            domain = np.full(len(ids), domain)
        if not self._graphs.layers:
            return self._run(self._graphs.mixed, {"ids": ids, "dense": dense, "domain": domain}, ())
        present, places = np.unique(domain, return_inverse=True)
        if plan is None:
            plan = "mixed" if len(present) > 1 and len(domain) < _ROWS_A_DOMAIN * len(present) else "by_domain"
        if plan == "mixed":
            return self._mixed(ids, dense, domain, present, places)
        return self._by_domain(ids, dense, present.tolist(), places)

    def with_adapter(self, domain: str, banks: Mapping[str, NDArray[Any]]) -> Self:
        """A program with this adapter for a domain, known or new; the sessions are shared and this program stays as it is.

        Args:
            domain: its name; a new one comes last.
            banks: of each layer ``LAYER.lora_A (in, R)``, ``LAYER.lora_B (R, out)`` and, where domains have one,
                ``LAYER.lora_bias (out,)``: float32, of any rank, ``B`` with the layer's scale in it, as
                :func:`domlora.serving.export.banks_of` gives them.

        Raises:
            BundleError: names, shapes or types do not fit, or a number is not finite.
            ConfigError: a model without adapters, or a new domain for a network that has weights of each domain.
        """
        self._check_adapted()
        if self._graphs.reads_domain and domain not in self.domains:
            raise ConfigError(
                "this network has weights of its own for each domain, so none can be added to it", received=domain
            )
        return self._of({**self._adapters, domain: checked_banks(self._graphs.layers, banks)})

    def without(self, domain: str) -> Self:
        """A program without this domain's adapter.

        Later domains move down by one number. Where the network itself reads the domain, the domain stays and its rows
        are no longer corrected.

        Raises:
            UnknownDomainError: no such domain.
            ConfigError: a model without adapters.
        """
        self._check_adapted()
        if domain not in self._adapters:
            raise UnknownDomainError(
                "no adapter for this domain", received=domain, next_step=nearest(domain, self._adapters)
            )
        if self._graphs.reads_domain:
            return self._of({**self._adapters, domain: self._graphs.nothing})
        return self._of({name: banks for name, banks in self._adapters.items() if name != domain})

    @property
    def schema(self) -> Schema:
        """Features and their ids; its domains are those of the export."""
        return self._graphs.schema

    @property
    def layers(self) -> tuple[AdaptedLayer, ...]:
        """The layers that adapters correct."""
        return self._graphs.layers

    @cached_property
    def _stacked(self) -> Banks:
        """The banks of all domains."""
        return _stack(self._banks)

    def _of(self, adapters: Mapping[str, Banks]) -> Self:
        fresh = type(self)(self._graphs, adapters)
        if "_stacked" in self.__dict__ and adapters:
            _ = fresh._stacked  # now, and not when the first request waits for it
        return fresh

    def _mixed(
        self,
        ids: NDArray[Any],
        dense: NDArray[Any],
        domain: NDArray[Any],
        present: NDArray[Any],
        places: NDArray[Any],
    ) -> NDArray[np.float32]:
        """Of the adapters only those that these rows need, numbered anew: there may be thousands, and others tomorrow."""
        if self._graphs.reads_domain:  # the network itself takes the number
            return self._run(self._graphs.mixed, {"ids": ids, "dense": dense, "domain": domain}, self._stacked)
        without = int(present[0] < 0)
        stack = _stack([self._banks[number] for number in present[without:].tolist()] or [self._graphs.nothing])
        return self._run(self._graphs.mixed, {"ids": ids, "dense": dense, "domain": places - without}, stack)

    def _by_domain(
        self, ids: NDArray[Any], dense: NDArray[Any], present: list[int], places: NDArray[Any]
    ) -> NDArray[np.float32]:
        if len(present) == 1:
            return self._of_one(ids, dense, present[0])
        if self._graphs.lookup is not None:
            self._graphs.lookup.warm(ids)
        logits = np.empty(len(ids), dtype=np.float32)
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.arange(1, len(present)))
        for rows, number in zip(np.split(order, bounds), present, strict=True):
            logits[rows] = self._of_one(ids[rows], dense[rows], number)
        return logits

    def _of_one(self, ids: NDArray[Any], dense: NDArray[Any], number: int) -> NDArray[np.float32]:
        rows = {"ids": ids, "dense": dense}
        if self._graphs.reads_domain:
            rows["domain"] = np.full(len(ids), number)
        return self._run(self._graphs.one, rows, self._graphs.nothing if number < 0 else self._banks[number])

    def _run(self, session: Any, rows: dict[str, NDArray[Any]], banks: Banks) -> NDArray[np.float32]:
        rows.update(zip(self._graphs.fed, banks, strict=True))
        if self._graphs.lookup is not None:
            rows.update(self._graphs.lookup(rows["ids"]))
        logits: NDArray[np.float32] = session.run(["logits"], rows)[0]
        return logits

    def _check(self, ids: NDArray[Any], dense: NDArray[Any], domain: NDArray[Any] | int) -> None:
        num_rows = len(ids) if isinstance(ids, np.ndarray) and ids.ndim else 0
        _check_array("ids", ids, _INT64, (num_rows, self._graphs.num_ids.size))
        _check_array("dense", dense, _FLOAT32, (num_rows, self._graphs.num_dense))
        if not isinstance(domain, int):
            _check_array("domain", domain, _INT64, (num_rows,))
        if not num_rows:
            return
        wrong = ids.view(np.uint64) >= self._graphs.num_ids  # a number below zero is a very large one
        if np.count_nonzero(wrong):  # costs a fifth of wrong.any()
            row, slot = map(int, np.argwhere(wrong)[0])
            rule = f"ids of slot {slot} must be from 0 to {int(self._graphs.num_ids[slot]) - 1}"
            raise DataError(rule, received=int(ids[row, slot]), next_step="Encode rows with this folder's vocabularies")
        if dense.size and not np.isfinite(dense).all():
            raise DataError("dense numbers must be finite", received=float(dense[~np.isfinite(dense)][0]))
        lowest, highest = (domain, domain) if isinstance(domain, int) else (int(domain.min()), int(domain.max()))
        if lowest < -1 or highest >= len(self.domains):
            raise UnknownDomainError(
                f"domains must be numbers from 0 to {len(self.domains) - 1}, or -1 for none",
                received=lowest if lowest < -1 else highest,
            )

    def _check_adapted(self) -> None:
        if not self._graphs.layers:
            raise ConfigError("the exported model has no adapters", next_step="Export a bundle that was adapted")


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads leave the core to others
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _lookup(folder: Path, manifest: Mapping[str, Any], threads: int, rows: Source | None) -> Lookup | None:
    tables = [RemoteTable.of(told) for told in manifest.get("remote", ())]
    if not tables:
        return None
    if rows is not None:
        rows.check(tables)
    return Lookup(_session(folder / LOOKUPS, threads), tables, folder, rows)


def _nothing(layers: tuple[AdaptedLayer, ...]) -> Banks:
    """Banks of rank 1 that add zero."""
    shapes = [shape for layer in layers for shape in layer.shapes.values()]
    return tuple(np.zeros([1 if size is None else size for size in shape], dtype=np.float32) for shape in shapes)


def read_banks(file: Path) -> dict[str, NDArray[np.float32]]:
    """One domain's adapter from its file.

    Raises:
        BundleError: it is missing or not whole.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"an adapter's file must be whole ({error})", received=file.name) from error


def checked_banks(layers: tuple[AdaptedLayer, ...], banks: Mapping[str, NDArray[Any]]) -> Banks:
    """An adapter's arrays in the order of the inputs.

    Raises:
        BundleError: names, shapes or types do not fit, or a number is not finite.
    """
    shapes = {name: shape for layer in layers for name, shape in layer.shapes.items()}
    if shapes.keys() != banks.keys():
        raise BundleError(
            "an adapter must have the banks of every adapted layer", received=sorted(shapes.keys() ^ banks.keys())[:3]
        )
    for layer in layers:
        _check_layer(layer, banks)
    return tuple(np.ascontiguousarray(banks[name]) for name in shapes)


def _check_layer(layer: AdaptedLayer, banks: Mapping[str, NDArray[Any]]) -> None:
    given = {name: banks[name] for name in layer.shapes}
    ranks = {array.shape[shape.index(None)] if array.ndim == 2 else -1 for array, shape in _of_rank(given, layer)}
    fits = all(
        array.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, array.shape, strict=True))
        for array, shape in zip(given.values(), layer.shapes.values(), strict=True)
    )
    if len(ranks) != 1 or not fits:
        raise BundleError(
            f"banks must fit layer {layer.name!r}, {layer.in_features} to {layer.out_features}",
            received={name: array.shape for name, array in given.items()},
        )
    for name, array in given.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise BundleError("banks must hold finite numbers of type float32", received=(name, str(array.dtype)))


def _of_rank(
    given: Mapping[str, NDArray[Any]], layer: AdaptedLayer
) -> list[tuple[NDArray[Any], tuple[int | None, ...]]]:
    """The banks that have a rank, with their shapes."""
    return [(given[name], shape) for name, shape in layer.shapes.items() if None in shape]


def _stack(of: list[Banks]) -> Banks:
    """Banks of several domains in one array an input, those of a smaller rank filled up with zeros."""
    return tuple(_stack_input(column) for column in zip(*of, strict=True))


def _stack_input(column: tuple[NDArray[np.float32], ...]) -> NDArray[np.float32]:
    shapes = {bank.shape for bank in column}
    if len(shapes) == 1:
        return np.concatenate(column).reshape(len(column), *shapes.pop())
    stack = np.zeros((len(column), *np.max([bank.shape for bank in column], axis=0)), dtype=np.float32)
    for row, bank in zip(stack, column, strict=True):
        row[tuple(map(slice, bank.shape))] = bank
    return stack


def _check_array(name: str, array: object, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        found = (str(array.dtype), array.shape) if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{name} must be an array of {dtype.name} and of shape {shape}", received=found)
