"""JupyterLab as `moe-edu lab` starts it: the server imports nothing else from this package, so it loads no PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path


def lab_command() -> list[str]:
    """The command that starts it; append arguments as needed."""
    return [sys.executable, str(Path(__file__).parent / "prompt_lab.py")]
