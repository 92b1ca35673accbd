"""A trained model and all its versions as one directory that describes itself.

    manifest.json       which versions there are and which one is served: the only file that changes, by one rename
    versions/N.json     what version N is made of, with the sha256 of every file of it
    encoder@N/          raw value to id: schema.json, vocabularies.json
    base@N/             the weights that all domains share: model.safetensors, or delta.safetensors and delta.json
    adapters/NAME@N/    one domain's row of every bank, a directory that PEFT reads too and that can be used alone
    optimizer@N/        what an update's optimizer remembers

``@N`` is the version that wrote a part. Later versions use it as long as it stays the same for them, so that a version
costs what differs from its parent. A part is written under another name, brought to disk and renamed, and never changed.
"""

from domlora.bundle.bundle import Bundle
from domlora.bundle.difference import Diff, TableDiff, diff
from domlora.bundle.names import adapter_folders
from domlora.bundle.versions import Verified, Version, adapters_of, gc, set_default, verify, versions

__all__ = [
    "Bundle",
    "Diff",
    "TableDiff",
    "Verified",
    "Version",
    "adapter_folders",
    "adapters_of",
    "diff",
    "gc",
    "set_default",
    "verify",
    "versions",
]
