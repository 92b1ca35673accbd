"""The page itself: files that a server sends, or one file that holds all of them and the figures of a moment."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["MEDIA", "STATIC", "policy", "saved_page"]

STATIC = Path(__file__).parent / "static"
MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_SCRIPT = re.compile(r"<script(?: type=\"[a-z]+\")?>(.*?)</script>", re.DOTALL)
_MAP = re.compile(r"(<script type=\"importmap\">)(.*?)(</script>)", re.DOTALL)
_START = '<script type="module">import "console/main.js";</script>'
_STYLE = '<link rel="stylesheet" href="./console.css">'


@lru_cache(maxsize=1)
def policy() -> str:
    """What the page may do: load from its own server, run the scripts that are in it, and no more.

    >>> policy().startswith("default-src 'none'; script-src 'self' 'sha256-")
    True
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'self' {_hashes(_text('index.html'))}",
            "style-src 'self'",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def saved_page(documents: Mapping[str, Any]) -> str:
    """The page with everything in it: it needs no server, and its own policy lets it load nothing.

    Args:
        documents: what the page would ask a server for, by path.
    """
    page = _MAP.sub(_inlined_modules, _text("index.html")).replace(_START, _start(), 1)
    style = _text("console.css")
    data = msgspec.json.encode(documents).decode().replace("<", "\\u003c")
    rules = [
        "default-src 'none'",
        f"script-src 'strict-dynamic' {_hashes(page)}",
        f"style-src {_hash(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{"; ".join(rules)}">'
    saved = f'<script type="application/json" id="saved">{data}</script>\n</body>'
    page = page.replace('<meta charset="utf-8">', head, 1).replace(_STYLE, f"<style>{style}</style>", 1)
    return saved.join(page.rsplit("</body>", 1))


def _inlined_modules(found: re.Match[str]) -> str:
    """The import map with each module as an address that holds it."""
    modules = json.loads(found[2])["imports"]
    inside = {name: _address((STATIC / place).read_bytes()) for name, place in modules.items()}
    return f"{found[1]}{json.dumps({'imports': inside})}{found[3]}"


def _start() -> str:
    """The first module as a script that a script puts there: 'strict-dynamic' trusts it, and so what it imports."""
    first = json.dumps(_address((STATIC / "main.js").read_bytes()))
    put = f'Object.assign(document.createElement("script"), {{type: "module", src: {first}}})'
    return f"<script>document.head.append({put});</script>"


def _address(module: bytes) -> str:
    return f"data:text/javascript;base64,{base64.b64encode(module).decode()}"


def _text(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _hashes(page: str) -> str:
    return " ".join(_hash(script) for script in _SCRIPT.findall(page))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
