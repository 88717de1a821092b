"""The tables that ship with the package: compressed, each checked against its `sha256sum` line before it is read."""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names the file, the line where there is one, and the mend."""


def read_shipped(file: str, checksum_file: str) -> tuple[bytes, str]:
    """The bytes of a shipped file and its checksum line.

    Raises:
        CorpusError: one of them is missing.
    """
    folder = files("moe_edu.data").joinpath("files")
    try:
        return folder.joinpath(file).read_bytes(), folder.joinpath(checksum_file).read_text("ascii")
    except OSError as error:
        raise CorpusError(f"cannot read the shipped {file}: {error}; install moe_edu again") from error


def unpack_checked(compressed: bytes, checksum: str, file: str, rebuild: str) -> list[str]:
    """The lines of a shipped table; `rebuild` is the module that makes `file` again.

    Raises:
        CorpusError: the bytes are not those that the checksum was made of.
    """
    found, expected = hashlib.sha256(compressed).hexdigest(), checksum.split(" ")[0]
    if found != expected:
        raise CorpusError(
            f"{file} is damaged: its SHA-256 is {found[:12]}..., not {expected[:12]}...; install moe_edu again, or "
            f"rebuild it with: python -m {rebuild}"
        )
    return lzma.decompress(compressed).decode("utf-8").splitlines()
