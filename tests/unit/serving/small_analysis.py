"""The service itself, whose analyses take a minute."""

from __future__ import annotations

import sys

from domlora.serving.console import analysis
from domlora.serving.http import service
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.worker import Served
from domlora.serving.settings import Settings


def make(settings: Settings, metrics: Metrics) -> Served:
    analysis._COMMAND = (sys.executable, "-c", "import time; time.sleep(60)")
    return service.make(settings, metrics)
