"""Run a check separately, so that endless loops and crashes in the learner's code do not reach the lesson.

On Linux the check runs in a forked process, which is killed when its time is up. Elsewhere it runs in a thread, which
can be interrupted between two Python instructions but not within one.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple, TextIO

import torch

from moe_edu.exercises.judge import Verdict

MEMORY_LIMIT = 2 * 1024**3  # bytes beyond what the lesson already uses


class Report(NamedTuple):
    """A verdict, and what the learner's code printed."""

    verdict: Verdict
    printed: str


def run_guarded(check: Callable[[], Verdict], seconds: float) -> Report:
    """The verdict of `check`, or an error verdict if it takes too long or ends its process."""
    return _in_process(check, seconds) if sys.platform == "linux" else _in_thread(check, seconds)


def _timed_out(seconds: float) -> Verdict:
    return Verdict(
        "error",
        f"Your code was stopped after {seconds:g} seconds: is there a loop that never ends?",
    )


def _in_process(check: Callable[[], Verdict], seconds: float) -> Report:
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns about a fork while threads run. The child computes on one thread and exits without clean-up.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _answer_and_exit(check, writing)
    os.close(writing)
    try:
        message = _read_all(reading, time.monotonic() + seconds)
        if message is None:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if message is None:
        return Report(_timed_out(seconds), "")
    if not message:
        how = (
            f"signal {os.WTERMSIG(status)}"
            if os.WIFSIGNALED(status)
            else f"exit status {os.WEXITSTATUS(status)}"
        )
        return Report(
            Verdict("error", f"Your code ended the Python process ({how}). The lesson is not affected."), ""
        )
    reply = json.loads(message)
    return Report(Verdict(*reply["verdict"]), reply["printed"])


def _answer_and_exit(check: Callable[[], Verdict], writing: int) -> None:
    """What the child process does."""
    try:
        torch.set_num_threads(1)
        _limit_memory()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            verdict = _verdict(check)
        reply = json.dumps({"verdict": verdict, "printed": printed.getvalue()}).encode()
        while reply:
            reply = reply[os.write(writing, reply) :]
    finally:
        os._exit(0)


def _limit_memory() -> None:
    import resource

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # a machine may have stricter limits already
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, hard))


def _read_all(descriptor: int, deadline: float) -> bytes | None:
    """Everything until the other end closes; None if the deadline passes first."""
    message = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return None
        piece = os.read(descriptor, 65536)
        if not piece:
            return message
        message += piece


class _Divided(io.TextIOBase):
    """What one thread prints goes to `theirs`, everything else to `ours`."""

    def __init__(self, thread: threading.Thread, theirs: TextIO, ours: TextIO) -> None:
        self._thread, self._theirs, self._ours = thread, theirs, ours

    def write(self, text: str) -> int:
        return (self._theirs if threading.current_thread() is self._thread else self._ours).write(text)

    def flush(self) -> None:
        self._ours.flush()


def _in_thread(check: Callable[[], Verdict], seconds: float) -> Report:
    verdicts: list[Verdict] = []
    printed = io.StringIO()

    def work() -> None:
        with contextlib.suppress(SystemExit):
            verdicts.append(_verdict(check))

    worker = threading.Thread(target=work, daemon=True)
    # Set and restored here: a thread that does not end in time would restore it too late, or never.
    ours, sys.stdout = sys.stdout, _Divided(worker, printed, sys.stdout)
    try:
        worker.start()
        worker.join(seconds)
    finally:
        sys.stdout = ours
    if worker.is_alive() and worker.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
        return Report(_timed_out(seconds), "")
    if not verdicts:
        return Report(Verdict("error", "Your code ended its own thread (with SystemExit?)."), "")
    return Report(verdicts[0], printed.getvalue())


def _verdict(check: Callable[[], Verdict]) -> Verdict:
    try:
        return check()
    except MemoryError:
        return Verdict("error", "Your code asked for more memory than is available.")
    except RecursionError:
        return Verdict("error", "RecursionError: your code calls itself endlessly.")
