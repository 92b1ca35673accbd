"""The real application, and one request in it that does not come back: as a scoring call that hangs would do."""

from __future__ import annotations

import time
from typing import Any

from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import make as make_real
from domlora.serving.http.worker import Served
from domlora.serving.settings import Settings


def make(settings: Settings, metrics: Metrics) -> Served:
    served = make_real(settings, metrics)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for name, value in scope["headers"]:
            if name == b"x-hang-s":
                time.sleep(float(value))
        await served.app(scope, receive, send)

    return served._replace(app=app)
