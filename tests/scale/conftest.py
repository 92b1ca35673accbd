"""Several machines on one: run with ``python -m pytest -m scale -s tests/scale/replicas.py``, as root."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "reliability"):
    sys.path.insert(0, str(folder))
