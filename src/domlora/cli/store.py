"""``store``: what a server serves. Versions, deltas, pushed adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from domlora.cli.options import Overwrite, Version
from domlora.terminal import STDOUT, print_json

__all__ = ["add", "delta", "drop", "pack", "publish", "pull", "push", "set_live", "show", "store_app", "sweep"]

store_app = typer.Typer(
    no_args_is_help=True, help="Look into a store, the folder that `domlora serve` serves, and change it."
)

Place = Annotated[Path, typer.Argument(help="Folder of a store.")]
Url = Annotated[str, typer.Argument(help="Shared store: a folder, or s3://BUCKET/PATH.")]


@store_app.command()
def show(store: Place, json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """The versions of a store, which of them is live, and the adapters that were pushed."""
    from domlora.serving.store import Store

    opened = Store.open(store)
    state = opened.state()
    versions = [
        {
            "version": number,
            "live": number == state.live,
            "bundle_version": (facts := opened.facts(number))["bundle_version"],
            "base": facts["base"][:12],
            "domains": len(facts["domains"]),
        }
        for number in opened.versions()
    ]
    fields = ("domain", "version", "pinned", "rank", "size_bytes", "since")
    adapters = [
        {**{name: getattr(each, name) for name in fields}, "base": each.base[:12]} for each in state.adapters.values()
    ]
    if json_:
        print_json({"versions": versions, "adapters": adapters, "removed": sorted(state.removed)})
        return
    _print_table(versions)
    if adapters:
        _print_table(adapters)
    if state.removed:
        STDOUT.print(f"not served: {', '.join(sorted(state.removed))}", markup=False, highlight=False, soft_wrap=True)


@store_app.command()
def add(
    store: Annotated[Path, typer.Argument(help="Folder of a store; made if it is not there.")],
    new: Annotated[Path, typer.Argument(help="Folder that `domlora export` or `domlora store delta` wrote.")],
    number: Annotated[int | None, typer.Option("--number", help="Of the version; the bundle's own without.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Serve it at once.")] = False,
) -> None:
    """Take in a version: an exported folder, or what differs from a version that is in the store."""
    from domlora.serving.delta import DELTA
    from domlora.serving.store import Store

    opened = Store.create(store)
    added = opened.add_delta(new, number) if (new / DELTA).is_file() else opened.add_version(new, number)
    if live:
        opened.set_live(added)
    what = "live" if opened.state().live == added else "not live yet"
    _say(f"version {added} is in {store}, {what}")


@store_app.command()
def delta(
    old: Annotated[Path, typer.Argument(help="Exported folder that the server has.")],
    new: Annotated[Path, typer.Argument(help="Exported folder that it is to have.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write what differs between two exported folders: rows of tables that changed, and files."""
    from domlora.serving.delta import write

    told = write(old, new, out, overwrite=overwrite)
    _say(
        f"{told.rows:,} of {told.of_rows:,} rows and {len(told.files)} files: "
        f"{told.size_bytes:,} bytes for {told.of_bytes:,}; wrote {out}"
    )


@store_app.command("set-live")
def set_live(store: Place, version: Annotated[int, typer.Argument(help="The version to serve.")]) -> None:
    """Serve another version, newer or older. All its files are checked first; running servers take it over by themselves."""
    from domlora.serving.store import Store

    Store.open(store).set_live(version)
    _say(f"version {version} of {store} is live")


@store_app.command()
def drop(store: Place, version: Annotated[int, typer.Argument(help="A version that is not live.")]) -> None:
    """Remove a version from a store."""
    from domlora.serving.store import Store

    Store.open(store).drop_version(version)
    _say(f"version {version} is not in {store} any more")


@store_app.command()
def pack(
    bundle: Annotated[Path, typer.Argument(help="Bundle that has the domain.")],
    domain: Annotated[str, typer.Argument(help="The domain.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    version: Version = None,
    label: Annotated[
        str | None, typer.Option("--label", help="What to call this adapter; the bundle's version without.")
    ] = None,
) -> None:
    """Write a domain's adapter as one file that servers of the same base take: `PUT /v1/adapters/DOMAIN`."""
    from domlora.bundle import Bundle
    from domlora.files import told
    from domlora.serving.pack import adapter_payload

    content = adapter_payload(Bundle.open(bundle, version=version), domain, version=label)
    with told(out):
        out.write_bytes(content)
    _say(f"{len(content):,} bytes; wrote {out}")


@store_app.command()
def push(
    store: Place,
    file: Annotated[Path, typer.Argument(help="File that `domlora store pack` wrote.")],
    label: Annotated[str | None, typer.Option("--label", help="What to call it; what the file says without.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep it in the memory of every process.")] = False,
) -> None:
    """Serve an adapter from this machine's store; over HTTP it is `PUT /v1/adapters/DOMAIN`."""
    from domlora.files import told
    from domlora.serving.payload import read_payload
    from domlora.serving.store import Store

    with told(file):
        content = file.read_bytes()
    adapter = Store.open(store).put_adapter(read_payload(content).domain, content, label, pinned)
    _say(f"version {adapter.version} of {adapter.domain} is served from {store}")


@store_app.command()
def publish(
    store: Place,
    url: Url,
    delta: Annotated[
        bool,
        typer.Option("--delta", help="Also send what differs from the version live there, for replicas that have it."),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Send files that should be there too: one of them was found damaged.")
    ] = False,
) -> None:
    """Let all servers of a shared store serve what this store holds: `domlora serve --store-url`."""
    from domlora.serving.shared.place import Place as Shared
    from domlora.serving.shared.publishing import publish as run
    from domlora.serving.store import Store

    told = run(Store.open(store), Shared(url), delta=delta, again=again)
    _say(f"generation {told.generation}: sent {told.files:,} files, {told.size_bytes:,} bytes")


@store_app.command()
def pull(
    store: Annotated[Path, typer.Argument(help="Folder of a store; made if it is not there.")],
    url: Url,
) -> None:
    """Bring what others have published into this store, beside its own changes."""
    from domlora.serving.shared.place import Place as Shared
    from domlora.serving.shared.publishing import pull as run
    from domlora.serving.store import Store

    _say(f"{store} knows generation {run(Store.create(store), Shared(url)).generation}")


@store_app.command()
def sweep(
    url: Url,
    keep_days: Annotated[
        float, typer.Option("--keep-days", help="What was served or sent within so many days stays.")
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove files of a shared store that were not served for some days."""
    from domlora.serving.shared.place import Place as Shared
    from domlora.serving.shared.sweep import sweep as run

    told = run(Shared(url), keep_s=86_400 * keep_days, dry_run=dry_run)
    _say(
        f"{'would remove' if dry_run else 'removed'} {told.files:,} files, {told.size_bytes:,} bytes; {told.kept:,} stay"
    )


def _print_table(lines: list[dict[str, object]]) -> None:
    names = list(lines[0]) if lines else ["version", "live"]
    STDOUT.print(f"| {' | '.join(names)} |", markup=False, highlight=False, soft_wrap=True)
    STDOUT.print(f"|{' --- |' * len(names)}", markup=False, highlight=False, soft_wrap=True)
    for line in lines:
        cells = ("" if value is False else str(value) for value in line.values())
        STDOUT.print(f"| {' | '.join(cells)} |", markup=False, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    STDOUT.print(text, markup=False, highlight=False, soft_wrap=True)
