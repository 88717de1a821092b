"""Worker processes: each computes the gradients of its shards on weights that all processes share.

    main process      shard 0 | + gradients of the others, clip, AdamW, write the weights | shard 0 of the next batch
    worker            shard 1 |                     waits                                 | shard 1

Weights and gradients lie in one file that every process maps into its memory; shards and results go through pipes.
Processes instead of threads, because Python runs one thread at a time, and this model's operations are so short that
threads would wait for each other. A worker ends when its pipe closes, so none outlives the main process.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_edu.gradients import Shard, ShardResult, add_gradients, bind_parameters
from moe_edu.losses import MoELoss
from moe_edu.machine import peak_memory_mb
from moe_edu.metrics import ExpertMetrics
from moe_edu.model import MoETranslator
from moe_edu.settings import TrainingSettings


class WorkerPool:
    """`count` worker processes for models like `model`; a context manager, which ends them.

    While it is open, this process and each worker use their share of PyTorch's CPU threads.

    Attributes:
        count: the workers, this process left out.
        weights, gradients: `[parameters]` each, shared memory for the main process's own model.
    """

    def __init__(self, count: int, model: MoETranslator, settings: TrainingSettings) -> None:
        self.count = count
        self._all_threads = torch.get_num_threads()
        threads = max(1, self._all_threads // (1 + count))
        torch.set_num_threads(threads)
        size = sum(parameter.numel() for parameter in model.parameters())
        self._folder = tempfile.TemporaryDirectory(prefix="moe_edu_", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / "weights_and_gradients.bin"
        self.weights, self.gradients, *self._theirs = map_shared(path, size, count)
        self._processes: list[subprocess.Popen[bytes]] = []
        # The worker must find this package, also where a notebook has put it on the path.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        for index in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "moe_edu.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._processes.append(process)
            _request(process, (path, size, count, index, model.config, settings, threads))
        for process in self._processes:
            _receive(process)  # ready: the start is no part of the training time

    def start(self, shards: Sequence[Shard]) -> None:
        """Give each worker one shard; `shards` may be fewer than the workers."""
        for process, shard in zip(self._processes, shards, strict=False):
            _request(process, shard)

    def finish(self, count: int) -> list[ShardResult]:
        """Wait for the `count` shards that were started, and add their gradients to `gradients`, in order."""
        results = []
        for process, theirs in zip(self._processes[:count], self._theirs, strict=False):
            results.append(_unpack(_receive(process)))
            self.gradients.add_(theirs)
        return results

    def peak_memory_mb(self) -> float:
        """The sum of the workers' peaks, in MB; 0 where the system does not say."""
        for process in self._processes:
            _request(process, None)
        return sum(_receive(process) or 0.0 for process in self._processes)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.communicate()  # closes the pipe, which ends the worker
        self._folder.cleanup()
        torch.set_num_threads(self._all_threads)


def map_shared(path: Path, size: int, workers: int) -> tuple[Tensor, ...]:
    """The weights, the main process's gradients and each worker's: `[size]` fp32 each, in the file at `path`."""
    rows = 2 + workers
    return (
        torch.from_file(str(path), shared=True, size=rows * size, dtype=torch.float32)
        .view(rows, size)
        .unbind()
    )


def main() -> None:
    """A worker: compute the gradients of each shard that comes in, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    path, size, count, index, config, settings, threads = pickle.load(requests)
    torch.set_num_threads(threads)
    model = MoETranslator(config).train()
    weights, _, *gradients = map_shared(path, size, count)
    bind_parameters(model, weights, gradients[index])
    _send(replies, "ready")
    while True:
        try:
            shard = pickle.load(requests)
        except EOFError:
            return
        if shard is None:
            _send(replies, peak_memory_mb())
        else:
            gradients[index].zero_()
            _send(replies, _pack(add_gradients(model, shard, settings)))


def _request(process: subprocess.Popen[bytes], value: object) -> None:
    try:
        _send(process.stdin, value)
    except BrokenPipeError as error:
        raise _ended(process) from error


def _receive(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        return pickle.load(
            process.stdout
        )  # from a child of our own, over a pipe that nobody else can write to
    except EOFError as error:
        raise _ended(process) from error


def _ended(process: subprocess.Popen[bytes]) -> RuntimeError:
    return RuntimeError(
        f"a worker process ended with status {process.wait()}; its own message went to the standard error. "
        "Train with processes=1 to see it here"
    )


def _send(pipe: Any, value: object) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


# Pickling a tensor takes longer than some layers: results travel as arrays.
def _pack(result: ShardResult) -> tuple[Any, ...]:
    loss, metrics, load = result
    return (
        torch.stack(list(loss)).numpy(),
        [torch.stack(list(layer)).detach().numpy() for layer in metrics],
        {layer: shares.numpy() for layer, shares in load.items()},
    )


def _unpack(packed: tuple[Any, ...]) -> ShardResult:
    loss, metrics, load = packed
    return ShardResult(
        MoELoss(*torch.from_numpy(loss).unbind()),
        tuple(ExpertMetrics(*torch.from_numpy(layer).unbind()) for layer in metrics),
        {layer: torch.from_numpy(shares) for layer, shares in load.items()},
    )


if __name__ == "__main__":
    main()
