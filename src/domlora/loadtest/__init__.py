"""Load for a running server, and what became of it; see :class:`Plan`, :func:`run` and :class:`Report`."""

from domlora.loadtest.bodies import draw_domains, from_file, http_request, random_requests
from domlora.loadtest.measure import Plan, Report, cpu_seconds, run

__all__ = ["Plan", "Report", "cpu_seconds", "draw_domains", "from_file", "http_request", "random_requests", "run"]
