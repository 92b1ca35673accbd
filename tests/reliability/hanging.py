"""The real application, and one request in it that does not come back: as a scoring call that hangs would do."""

from __future__ import annotations

import time

from domlora.serving.http.answers import Answer, Request
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import make as make_real
from domlora.serving.http.worker import Served
from domlora.serving.settings import Settings


def make(settings: Settings, metrics: Metrics) -> Served:
    served = make_real(settings, metrics)

    def scorer(request: Request) -> Answer:
        time.sleep(float(request.headers.get(b"x-hang-s", 0)))
        assert served.scorer is not None
        return served.scorer(request)

    return served._replace(scorer=scorer)
