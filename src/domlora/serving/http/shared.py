"""What the connections of a process share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from domlora.serving.http.exchange import Scorer
from domlora.serving.http.limits import Admission
from domlora.serving.http.metrics import Metrics
from domlora.serving.settings import Settings

__all__ = ["Shared"]


@dataclass(slots=True)
class Shared:
    """What the connections of a process share.

    Args:
        settings: of the server.
        metrics: where refusals are counted.
        admission: who waits for a turn.
        draining: the server ends soon, and is not ready.
        closing: nobody new can come; no connection is kept after its answer.
        scorer: answers requests to score; while there is none, the application does.
        refused: reasons and statuses that :meth:`count` has not told the metrics yet.
    """

    settings: Settings
    metrics: Metrics
    admission: Admission = field(init=False)
    draining: bool = False
    closing: bool = False
    scorer: Scorer | None = None
    refused: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings.max_wait_s)

    def count(self) -> None:
        """Tell the metrics what was refused; called now and then, because in an overload counting costs too."""
        while self.refused:
            (reason, status), number = self.refused.popitem()
            self.metrics.refused(reason, status, number)
