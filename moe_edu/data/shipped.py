"""The compressed tables that ship with the package, each checked against its `sha256sum` line before it is read."""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names the file, the line if there is one, and the fix."""


def read_shipped(file: str, checksum_file: str) -> tuple[bytes, str]:
    """The bytes of a shipped file and its checksum line.

    Raises:
        CorpusError: one of them is missing.
    """
    folder = files("moe_edu.data").joinpath("files")
    try:
        return folder.joinpath(file).read_bytes(), folder.joinpath(checksum_file).read_text("ascii")
    except OSError as error:
        raise CorpusError(f"cannot read the shipped {file}: {error}; reinstall moe_edu") from error


def unpack_checked(compressed: bytes, checksum: str, file: str, rebuild: str) -> list[str]:
    """The lines of a shipped table; `rebuild` is the module that rebuilds `file`.

    Raises:
        CorpusError: the bytes do not match the checksum.
    """
    found, expected = hashlib.sha256(compressed).hexdigest(), checksum.split(" ")[0]
    if found != expected:
        raise CorpusError(
            f"{file} is damaged: its SHA-256 is {found[:12]}..., not {expected[:12]}...; reinstall moe_edu, or "
            f"rebuild it with: python -m {rebuild}"
        )
    return lzma.decompress(compressed).decode("utf-8").splitlines()
