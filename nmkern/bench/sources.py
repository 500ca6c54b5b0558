"""What the native libraries are built from, as a hash: the same in setup.py's records and in measured rows.

setup.py runs this file by its path, where neither the package nor PyTorch can be imported yet.
"""

import hashlib
from pathlib import Path


def digest(root: Path) -> str:
    """Of setup.py, which has the flags, and all below csrc: names and contents, as 16 hex digits."""
    told = hashlib.sha256()
    for path in sorted([root / "setup.py", *(root / "csrc").rglob("*")]):
        if path.is_file():
            content = path.read_bytes()
            told.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return told.hexdigest()[:16]
