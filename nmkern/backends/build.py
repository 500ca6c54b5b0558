"""What setup.py wrote beside the package about the builds of its native libraries."""

import json
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def read(record: Path) -> dict[str, str]:
    """The record of a library: ``built`` ("yes" or "no") and ``detail``, how or why not."""
    try:
        return json.loads(record.read_text())
    except FileNotFoundError:
        return {"built": "no", "detail": "the package was not installed (run pip install .)"}
