"""A training run and its folder: the log, the state and the result, in files that are never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_edu.data import SentencePair
from moe_edu.model.checkpoint import CheckpointError
from moe_edu.model.pretrained import TextTranslator
from moe_edu.training.evaluation import evaluate
from moe_edu.training.trainer import Trainer

STATE_FILE = "training_state.safetensors"
LOG_FILE = "log.jsonl"
RESULT_FILE = "result.json"

Record = dict[str, Any]


class Run:
    """A run of a trainer: its progress, its log, and its folder.

    The trainer counts the steps; the run adds the clock and the tokens.

    Attributes:
        trainer: the trainer that runs.
        translator: the trainer's model with its tokenizer.
        directory: the run's folder; None keeps everything in memory.
        identity: settings, configuration and corpus; a run can only resume one with the same identity.
        seconds: training time so far.
        tokens: real tokens seen so far, source and target.
        log: one record per log line.
    """

    def __init__(
        self,
        trainer: Trainer,
        translator: TextTranslator,
        corpus_digest: str,
        directory: Path | None = None,
    ) -> None:
        """Reads and writes no file; `begin` and `resume` do."""
        self.trainer = trainer
        self.translator = translator
        self.directory = directory
        self.identity = {
            "settings": asdict(trainer.settings),
            "config": asdict(trainer.model.config),
            "data": {"corpus": corpus_digest},
        }
        self.seconds = 0.0
        self.tokens = 0
        self.log = RunLog()

    @property
    def fraction(self) -> float:
        """Share of the run that is done: of the seconds if `settings.seconds` is set, else of the steps."""
        settings = self.trainer.settings
        if settings.seconds is None:
            return self.trainer.steps_done / settings.steps
        return self.seconds / settings.seconds

    @property
    def tokens_per_second(self) -> int:
        return round(self.tokens / max(self.seconds, 1e-9))

    def begin(self) -> None:
        """Start an empty log in the folder."""
        if self.directory is not None:
            self.log = RunLog(self.directory / LOG_FILE)

    def resume(self) -> None:
        """Bring the trainer, the progress and the log back to the saved state in the folder.

        Raises:
            CheckpointError: there is no state, or it is damaged or belongs to another model.
            ValueError: the run there began with other settings or another corpus; the message names each field that
                differs.
        """
        if self.directory is None:
            raise ValueError("a run in memory leaves nothing to resume")
        saved, tensors = read_state(self.directory)
        check_same_run(saved["identity"], self.identity)
        self._restore(tensors)
        self.trainer.scaler.load_state_dict(saved["scaler"])
        progress = saved["progress"]
        self.trainer.steps_done = progress["step"]
        self.seconds, self.tokens = progress["seconds"], progress["tokens"]
        self.log = RunLog(self.directory / LOG_FILE, self.trainer.steps_done)

    def save(self) -> None:
        """Replace the saved state in the folder: weights, optimizer moments, progress."""
        if self.directory is None or self.trainer.steps_done == 0:
            return
        trainer = self.trainer
        tensors = {
            f"model.{name}": parameter.detach() for name, parameter in trainer.model.named_parameters()
        }
        for index, moments in trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        state = {
            "progress": {"step": trainer.steps_done, "seconds": self.seconds, "tokens": self.tokens},
            "identity": self.identity,
            "scaler": trainer.scaler.state_dict(),
        }
        scratch = self.directory / (STATE_FILE + ".part")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            scratch,
            metadata={"progress": json.dumps(state)},
        )
        _publish(scratch, self.directory / STATE_FILE)

    def finish(self, test: Sequence[SentencePair], dtype: torch.dtype) -> dict[str, Any]:
        """Save the model in the folder, test it, and return the contents of `result.json`.

        Args:
            test: the sentences to translate.
            dtype: precision of the saved model.
        """
        self.trainer.model.eval()
        if self.directory is not None:
            self.translator.save_pretrained(self.directory, dtype)
        scores = evaluate(self.translator, test)
        result = {
            "seconds": round(self.seconds, 1),
            "steps": self.trainer.steps_done,
            "tokens_per_second": self.tokens_per_second,
            "parameters": self.trainer.weights.numel(),
            "test": scores.to_json(),
            "peak_rss_mb": self.trainer.peak_memory_mb(),
            "settings": self.identity["settings"],
            "config": self.identity["config"],
        }
        if self.directory is not None:
            write_json(self.directory / RESULT_FILE, result)
        return result

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the weights and moments of a saved state into the trainer's."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, key = rest.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        optimizer = self.trainer.optimizer
        try:
            with torch.no_grad():
                for name, parameter in self.trainer.model.named_parameters():
                    parameter.copy_(tensors[f"model.{name}"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the state in {self.directory} belongs to another model: {error}"
            ) from error


def prepare_directory(out: str | Path | None, resume: bool) -> Path | None:
    """Make the run's folder; refuse to overwrite a run, or to resume without one."""
    if out is None:
        if resume:
            raise ValueError("resume needs `out`, the folder of the run to continue")
        return None
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    if not resume and (directory / STATE_FILE).exists():
        raise ValueError(f"{directory} already holds a run: resume it (`--resume`), or choose another folder")
    return directory


def check_same_run(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to resume with settings other than those the run began with.

    Raises:
        ValueError: settings differ; the message names each field.
    """
    differences = []
    for part, fields in given.items():
        for name, value in fields.items():
            # JSON has no tuples.
            value = list(value) if isinstance(value, tuple) else value
            before = saved.get(part, {}).get(name)
            if before != value:
                differences.append(f"{name} was {before!r}, is {value!r}")
    if differences:
        raise ValueError(
            f"the run began with other settings: {'; '.join(differences)}. Use the settings that it began with, or "
            "start again in another folder"
        )


def read_state(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The progress and the tensors of a saved state; errors as in `Run.resume`."""
    path = directory / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"nothing to resume in {directory}: leave out --resume to start a run there")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned, because a memory-mapped tensor keeps the file open, and Windows then refuses to replace it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return json.loads(file.metadata()["progress"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


class RunLog:
    """One JSON object per line, flushed line by line; resuming drops lines from after the saved state."""

    def __init__(self, path: Path | None = None, resume_step: int | None = None) -> None:
        """`path` None keeps the log in memory; `resume_step` None starts an empty one."""
        kept: list[dict[str, Any]] = []
        if path is not None and resume_step is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line cut short when the run was killed
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


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _publish(scratch, path)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _publish(scratch: Path, path: Path) -> None:
    """Flush `scratch` to disk, then rename it to `path` in one step."""
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
