"""Worker processes: each computes its shards' gradients, or translates, with weights that all processes share.

    main process      shard 0 | + gradients of the others, clip, AdamW, write the weights | shard 0 of the next batch
    worker            shard 1 |                     waits                                 | shard 1

Weights and gradients are in one file that every process maps into its memory; shards and results go through pipes.
These are processes and not threads, because Python runs one thread at a time, and this model's operations are so short
that threads would wait for each other. A worker ends when its pipe closes, so none outlives the main process.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from moe_edu.model.translator import MoETranslator
from moe_edu.system.machine import peak_memory_mb
from moe_edu.training.settings import TrainingSettings
from moe_edu.training.shards import ScaledShard, Shard, ShardResult, add_gradients, bind_parameters

# Until a process has freed a larger block, glibc returns freed memory to the system: without these settings a new
# worker would need new pages at every step.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


class Sentences(NamedTuple):
    """Sentences to translate: ids and mask `[B, S]`, and the options of `moe_edu.model.generation.generate`."""

    input_ids: Tensor
    attention_mask: Tensor
    options: dict[str, Any]


class WorkerPool:
    """`count` worker processes for `model`, on the CPU; a context manager, which ends them.

    While it is open, PyTorch's CPU threads are divided among this process and the workers.

    Attributes:
        count: the number of workers, without this process.
        weights, gradients: `[parameters]` each, shared memory for the main process's own model. The weights start as
            those of `model`; the workers compute with whatever is written there.
    """

    def __init__(self, count: int, model: MoETranslator, settings: TrainingSettings) -> None:
        self.count = count
        self._model = model
        self._all_threads = torch.get_num_threads()
        threads = max(1, self._all_threads // (1 + count))
        torch.set_num_threads(threads)
        size = sum(parameter.numel() for parameter in model.parameters())
        self._folder = tempfile.TemporaryDirectory(prefix="moe_edu_", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / "weights_and_gradients.bin"
        self.weights, self.gradients, *self._theirs = map_shared(path, size, count)
        with torch.no_grad():
            self.weights.copy_(parameters_to_vector(model.parameters()))
        self._processes: list[subprocess.Popen[bytes]] = []
        # The worker must find this package even if a notebook added it to the path.
        modules = {"PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        environment = _KEEP_FREED_MEMORY | os.environ | modules
        for index in range(count):
            process = subprocess.Popen(
                # -P: a user's file with the name of a standard module must not replace that module.
                [sys.executable, "-P", "-m", "moe_edu.training.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._processes.append(process)
            _request(process, (path, size, count, index, model.config, settings, threads))
        for process in self._processes:
            _receive(process)  # wait until it is ready, so that training time does not include the start

    def start(self, shards: Sequence[Shard], loss_scale: float = 1.0) -> None:
        """Give each worker one shard; `shards` may be fewer than the workers."""
        for process, shard in zip(self._processes, shards, strict=False):
            _request(process, ScaledShard(shard, loss_scale))

    def finish(self, count: int) -> list[ShardResult]:
        """Wait for the `count` shards that were started, and add their gradients to `gradients`, in order."""
        results = []
        for process, theirs in zip(self._processes[:count], self._theirs, strict=False):
            results.append(_receive(process))
            self.gradients.add_(theirs)
        return results

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Like `model.generate`, with the sentences dealt by length to all processes.

        The model must be in eval mode and have the shared weights. If sentences compete for the experts' slots, or once
        the workers have ended, all sentences stay in this process.
        """
        model = self._model
        competing = model.config.moe_eval_capacity_token_fraction < 1
        shares = deal(attention_mask.sum(dim=1), 1 if competing else 1 + len(self._processes))
        own, *others = (_trim(input_ids[rows], attention_mask[rows], options) for rows in shares)
        busy = self._processes[: len(others)]
        for process, sentences in zip(busy, others, strict=True):
            _request(process, sentences)
        tokens = [model.generate(own.input_ids, own.attention_mask, **options)]
        tokens += [_receive(process) for process in busy]
        longest = max(part.shape[1] for part in tokens)
        joined = tokens[0].new_full((len(input_ids), longest), model.config.pad_token_id)
        for rows, part in zip(shares, tokens, strict=True):
            joined[rows, : part.shape[1]] = part
        return joined

    def peak_memory_mb(self) -> float:
        """The sum of the workers' peaks, in MB; 0 where the system does not report them."""
        for process in self._processes:
            _request(process, None)
        return sum(_receive(process) or 0.0 for process in self._processes)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.communicate()  # closes the pipe, which ends the worker
        self._processes = []
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


def deal(lengths: Tensor, parts: int) -> list[Tensor]:
    """Deal sentences of `lengths [B]` into at most `parts` parts with about equal tokens: their indices, longest first.

    Sentences of similar length take a similar number of steps: grouped by length, short ones need not wait for long
    ones.
    """
    order = lengths.argsort(descending=True, stable=True)
    before = lengths[order].cumsum(0) - lengths[order]
    part = before * parts // lengths.sum()
    return [order[part == index] for index in part.unique()]


def _trim(input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]) -> Sentences:
    """The sentences, cut after the last column in which any of them has a real token."""
    width = 1 + int(attention_mask.any(dim=0).nonzero().max())
    return Sentences(input_ids[:, :width], attention_mask[:, :width], options)


def main() -> None:
    """A worker: answer each request until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Python or a library prints must not end up among the replies
    path, size, count, index, config, settings, threads = pickle.load(requests)
    torch.set_num_threads(threads)
    model = MoETranslator(config)
    weights, _, *gradients = map_shared(path, size, count)
    bind_parameters(model, weights, gradients[index])
    _send(replies, "ready")
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        if request is None:
            _send(replies, peak_memory_mb())
            continue
        training = isinstance(request, ScaledShard)
        if model.training != training:
            model.train(training)
        if training:
            gradients[index].zero_()
            _send(replies, add_gradients(model, request.shard, settings, loss_scale=request.loss_scale))
        else:
            ids, mask, options = request
            _send(replies, model.generate(ids, mask, **options))


def _request(process: subprocess.Popen[bytes], value: object) -> None:
    try:
        _send(process.stdin, value)
    except BrokenPipeError as error:
        raise _ended(process) from error


def _receive(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        return pickle.load(process.stdout)  # safe to unpickle: only our own child can write to this pipe
    except EOFError as error:
        raise _ended(process) from error


def _ended(process: subprocess.Popen[bytes]) -> RuntimeError:
    return RuntimeError(
        f"a worker process ended with status {process.wait()}; its own message went to the standard error. "
        "Train with processes=1 to see that message here"
    )


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, without their graph: pickling them as tensors takes longer than computing a layer."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.dtype == torch.bfloat16:  # NumPy has no bfloat16
            return Tensor.view, (value.detach().view(torch.int16), torch.bfloat16)
        return torch.from_numpy, (value.detach().numpy(),)


def _send(pipe: Any, value: object) -> None:
    _Pickler(pipe, pickle.HIGHEST_PROTOCOL).dump(value)
    pipe.flush()


if __name__ == "__main__":
    main()
