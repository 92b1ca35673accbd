"""``bundle``: look into one, compare its versions, and choose which is served."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from domlora.errors import ConfigError
from domlora.terminal import STDOUT, print_json

__all__ = ["bundle_app", "compare", "default", "garbage", "show", "verify"]

bundle_app = typer.Typer(no_args_is_help=True, help="Look into a bundle, and choose which of its versions is served.")

Folder = Annotated[Path, typer.Argument(help="Folder of a bundle.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, with all facts.")]


@bundle_app.command()
def show(bundle: Folder, json_: Json = False) -> None:
    """The versions of a bundle: what each wrote and where it came from."""
    from domlora.bundle import versions

    found = versions(bundle)
    if json_:
        print_json([asdict(version) for version in found])
        return
    STDOUT.print("| version | parent | | written | domains | size | parts |", highlight=False)
    STDOUT.print("| ---: | ---: | --- | --- | ---: | ---: | --- |", highlight=False)
    for one in found:
        parts = ", ".join(f"{count} {what}" if count > 1 else what for what, count in one.written.items() if count)
        cells = (
            f"{one.number}",
            "-" if one.parent is None else f"{one.parent}",
            "default" if one.default else "",
            one.created,
            f"{one.domains}",
            f"{one.size_bytes:,}",
            parts,
        )
        STDOUT.print(f"| {' | '.join(cells)} |", markup=False, highlight=False, soft_wrap=True)


@bundle_app.command()
def verify(bundle: Folder) -> None:
    """Read every file of every version and compare it with its sha256."""
    from domlora.bundle import verify as run

    found = run(bundle)
    STDOUT.print(
        f"{len(found.versions)} versions, {found.files:,} files, {found.size_bytes:,} bytes: all as written",
        highlight=False,
    )


@bundle_app.command("diff")
def compare(
    bundle: Folder,
    one: Annotated[int, typer.Argument(help="A version.")],
    two: Annotated[int, typer.Argument(help="Another one.")],
) -> None:
    """What differs between two versions: domains, vocabularies, rows of tables, dense weights, adapters, facts."""
    from domlora.bundle import diff

    print_json(asdict(diff(bundle, one, two)))


@bundle_app.command("set-default")
def default(bundle: Folder, version: Annotated[int, typer.Argument(help="The version to serve.")]) -> None:
    """Serve another version: a candidate, or an earlier one again. All its files are checked first."""
    from domlora.bundle import set_default

    set_default(bundle, version)
    STDOUT.print(f"version {version} of {bundle} is the default", markup=False, highlight=False, soft_wrap=True)


@bundle_app.command("gc")
def garbage(
    bundle: Folder,
    keep: Annotated[
        int, typer.Option("--keep", help="How many of the newest versions stay, beside the default one.")
    ] = 5,
) -> None:
    """Remove old versions, and files that no version needs."""
    from domlora.bundle import gc, versions

    if keep < 0:
        raise ConfigError("--keep must be at least 0", received=keep)
    numbers = [version.number for version in versions(bundle)]
    removed = gc(bundle, keep=numbers[len(numbers) - min(keep, len(numbers)) :])
    STDOUT.print(f"removed {len(removed)} files and folders", highlight=False)
