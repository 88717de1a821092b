"""A training run on disk: its log, its resumable state, and files that are never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_edu.model.checkpoint import CheckpointError

STATE_FILE = "training_state.safetensors"
LOG_FILE = "log.jsonl"
RESULT_FILE = "result.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _publish(scratch, path)


def save_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Replace the run's resumable state: weights, optimizer moments, and `progress` (JSON)."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    scratch = directory / (STATE_FILE + ".part")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        scratch,
        metadata={"progress": json.dumps(dict(progress))},
    )
    _publish(scratch, directory / STATE_FILE)


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Bring `model` and `optimizer` back; returns the saved progress.

    Raises:
        CheckpointError: no state there, a damaged one, or one of another model.
    """
    progress, tensors = read_state(directory)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, key = rest.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the state in {directory} is of another model: {error}") from error
    return progress


def read_state(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The progress and the tensors of a saved state; errors as `load_state`."""
    path = directory / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"nothing to resume in {directory}: leave out --resume to start a run there")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: what is mapped would hold the file, which Windows then refuses to replace.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return json.loads(file.metadata()["progress"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


class RunLog:
    """One JSON object a line, flushed line by line; resuming drops what came after the saved state."""

    def __init__(self, path: Path | None, resume_step: int | None = None) -> None:
        """`path` None keeps the log in memory; `resume_step` None starts an empty one."""
        kept: list[dict[str, Any]] = []
        if path is not None and resume_step is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line cut short by the kill
                if record["step"] <= resume_step:
                    kept.append(record)
        self.history: list[dict[str, Any]] = kept
        self._path = path
        if path is None:
            return
        scratch = path.with_name(path.name + ".part")
        scratch.write_text("".join(map(_line, kept)), encoding="utf-8")
        _publish(scratch, path)

    def append(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _publish(scratch: Path, path: Path) -> None:
    """Make `scratch` durable, then give it its name in one step."""
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
