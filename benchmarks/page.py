"""What a benchmark found, as data that goes from one process to the next and onto a page; and the page."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rounds import Ratio, digits

__all__ = ["Section", "Target", "markdown", "of_this_machine", "read", "show", "with_threads", "write"]

PACKAGES = ("torch", "numpy", "domlora", "peft", "transformers", "deepctr-torch", "torch-rechub", "fuxictr")


@dataclass(slots=True)
class Target:
    """A number that was asked for, and what was measured.

    Args:
        text: what is measured.
        value: the median of it.
        bound: the number asked for.
        at_most: whether the value must not exceed the bound; otherwise it must reach it.
        unit: what the number counts.
        low, high: the spread, if there is one.
        in_noise: whether a spread that reaches the bound is enough.
    """

    text: str
    value: float
    bound: float
    at_most: bool
    unit: str
    low: float | None = None
    high: float | None = None
    in_noise: bool = False

    @classmethod
    def of(cls, text: str, ratio: Ratio, bound: float, *, at_most: bool) -> Target:
        return cls(text, ratio.median, bound, at_most, "times", ratio.low, ratio.high)

    @property
    def met(self) -> bool:
        end = self.low if self.at_most else self.high
        value = end if self.in_noise and end is not None else self.value
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        spread, doubt = "", ""
        if self.low is not None and self.high is not None:
            spread = f" [{digits(self.low)}, {digits(self.high)}]"
            crosses = self.low <= self.bound <= self.high and not self.in_noise
            doubt = ", but the spread crosses the bound" if crosses else ""
        asked = f"{'at most' if self.at_most else 'at least'} {self.bound:g}"
        noise = " or within noise of it" if self.in_noise else ""
        verdict = "met" if self.met else "missed"
        return f"**{verdict}**: {self.text}: {digits(self.value)}{spread} {self.unit}; asked for {asked}{noise}{doubt}"


@dataclass(slots=True)
class Section:
    """A table with what its columns mean, and the targets that it decides."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    targets: list[Target] = field(default_factory=list)

    def to_markdown(self, with_targets: bool = True) -> str:
        table = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        lines = [f"## {self.title}", "", self.text, "", *("| " + " | ".join(row) + " |" for row in table)]
        told = ["", *(f"- {target}" for target in self.targets)] if with_targets and self.targets else []
        return "\n".join([*lines, *told]) + "\n"


def with_threads(section: Section, threads: int) -> Section:
    """The same, saying on how many threads."""
    told = f"{threads} thread{'s' if threads > 1 else ''}"
    section.title += f", {told}"
    for target in section.targets:
        target.text += f", {told}"
    return section


def write(path: Path, sections: Iterable[Section]) -> None:
    path.write_text(json.dumps([asdict(section) for section in sections], indent=2), encoding="utf-8")


def read(path: Path) -> list[Section]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [Section(**{**each, "targets": [Target(**target) for target in each["targets"]]}) for each in found]


def show(section: Section) -> None:
    print(section.to_markdown(), flush=True)


def of_this_machine() -> dict[str, str]:
    """What ran the benchmark: no name of a host, no path."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": f"{os.cpu_count()}",
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(_versions()),
    }


def markdown(title: str, text: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page. Every sentence with a number in it is made from the numbers."""
    lines = [
        f"# {title}",
        "",
        text,
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
    ]
    targets = [target for section in sections for target in section.targets]
    if targets:
        met = sum(target.met for target in targets)
        lines += ["", "## Targets", "", f"{met} of {len(targets)} met.", "", *(f"- {target}" for target in targets)]
    return "\n".join([*lines, "", *(section.to_markdown(with_targets=False) for section in sections)]).rstrip() + "\n"


def _versions() -> Iterable[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    return ", ".join([names[0] if names else platform.machine(), *wide])


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"
