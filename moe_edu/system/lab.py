"""JupyterLab as `moe-edu lab` starts it: a server that imports nothing else of this package, and so no PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path


def lab_command() -> list[str]:
    """The command that starts it, arguments to follow."""
    return [sys.executable, str(Path(__file__).parent / "prompt_lab.py")]
