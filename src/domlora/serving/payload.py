"""One domain's adapter as a single safetensors file, such as is pushed to a running server. Needs no torch.

Its tensors are the banks of each adapted layer as :meth:`domlora.serving.program.Program.with_adapter` takes them. Its one
metadata entry ``domlora`` is JSON: ``format``, ``domain``, ``base`` (the fingerprint of the network it was trained beside),
``version`` and ``sha256`` over all of these and the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from domlora.errors import BundleError

__all__ = ["Payload", "read_payload", "write_payload"]

_FORMAT = "domlora adapter 1"
_ENTRY = "domlora"
_LONGEST_HEADER = 1 << 20  # a header of 100 MB takes a parser minutes
_NEXT = "Write it with: domlora store pack BUNDLE DOMAIN --out FILE"


@dataclass(frozen=True, slots=True)
class Payload:
    """A domain's adapter.

    Args:
        domain: whose it is.
        base: fingerprint of the network that it corrects.
        version: what to call this one.
        banks: by the names of a program's inputs.
    """

    domain: str
    base: str
    version: str
    banks: Mapping[str, NDArray[Any]]


def write_payload(payload: Payload) -> bytes:
    """The file's content; equal payloads give equal bytes.

    Example:
        >>> import numpy as np
        >>> banks = {"tower.lora_A": np.zeros((4, 1), np.float32), "tower.lora_B": np.ones((1, 2), np.float32)}
        >>> content = write_payload(Payload("toys", "c0ffee", "2", banks))
        >>> read_payload(content).domain, read_payload(content).banks["tower.lora_B"].tolist()
        ('toys', [[1.0, 1.0]])
    """
    banks = {name: np.ascontiguousarray(bank) for name, bank in payload.banks.items()}
    facts = {"format": _FORMAT, "domain": payload.domain, "base": payload.base, "version": payload.version}
    said = json.dumps({**facts, "sha256": _digest(facts, banks)}, sort_keys=True)
    return save(banks, metadata={_ENTRY: said})  # one entry: several come in random order


def read_payload(content: bytes) -> Payload:
    """What :func:`write_payload` wrote, every bit of it checked. Whether it fits a model is another question.

    Raises:
        BundleError: it is truncated, damaged, or of another kind.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        if not 2 <= length <= min(_LONGEST_HEADER, len(content) - 8):
            raise ValueError(f"a header of {length} bytes in a file of {len(content)}")
        facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_ENTRY])
        if facts["format"] != _FORMAT:
            raise ValueError(f"format {facts['format']!r}, and this version reads {_FORMAT!r}")
        banks, said = load(content), facts.pop("sha256")
        payload = Payload(banks=banks, **{name: str(facts[name]) for name in ("domain", "base", "version")})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise BundleError(f"a pushed adapter must be whole ({_short(error)})", next_step=_NEXT) from error
    if said != _digest(facts, banks):
        raise BundleError("a pushed adapter must be as it was written, and its sha256 is another", next_step=_NEXT)
    return payload


def _digest(facts: Mapping[str, Any], banks: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, bank in sorted(banks.items()):
        digest.update(json.dumps([name, str(bank.dtype), bank.shape]).encode())
        digest.update(np.ascontiguousarray(bank).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
