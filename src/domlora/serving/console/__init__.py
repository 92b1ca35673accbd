"""The console: a page that shows what a server serves and counts. It changes nothing.

``routes`` gives the handlers by path; one that ends in ``/`` stands for all paths below it. All of them read files or
add up counters: they belong into a thread and not onto the event loop.
"""

from __future__ import annotations

from domlora.serving.console.handlers import routes
from domlora.serving.console.saved import export_page

__all__ = ["export_page", "routes"]
