"""Work in child processes: they can be ended, and take nothing of Python's lock from the thread that generates."""

import asyncio
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any


# numpy's threads would count as memory, and glibc would keep what a large picture took.
FRUGAL = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}


class Refused(ValueError):
    """A job that is not done; the message says why not."""


class Processes:
    """A few processes that do jobs, one each at a time; one that ends over a job is replaced.

    Args:
        program: A file that ends in [`work`].
        settings: What [`work`] is given first.
        number: How many.
        ended: What is said of a job over which its process ends.
    """

    def __init__(self, program: Path, settings: Any, number: int, ended: str):
        self.ended = ended
        self.processes = [_Process(program, settings) for _ in range(number)]
        self.idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self.processes:
            self.idle.put(process)
        self.threads = ThreadPoolExecutor(number)

    def submit(self, job: Any) -> "Future[bytes]":
        """Have a job done; its answer. A job that is cancelled before it has begun is dropped.

        Raises:
            Refused: As the result.
        """
        return self.threads.submit(self._do, job)

    async def do(self, job: Any) -> bytes:
        """As [`submit`], for whoever has an event loop."""
        return await asyncio.wrap_future(self.submit(job))

    def _do(self, job: Any) -> bytes:
        process = self.idle.get()
        try:
            went_well, answer = process.do(job)
        except (EOFError, OSError) as error:
            process.end()
            raise Refused(self.ended) from error
        finally:
            self.idle.put(process)
        if not went_well:
            raise Refused(answer.decode())
        return answer

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.end()


class _Process:
    """A process that is started by its first job."""

    def __init__(self, program: Path, settings: Any):
        self.program, self.settings, self.child = program, settings, None

    def do(self, job: Any) -> tuple[bool, bytes]:
        """Have a job done; raises `EOFError` or `OSError` if the process ends over it."""
        if self.child is None:
            environment = {**os.environ, **FRUGAL}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.child = subprocess.Popen([sys.executable, "-P", str(self.program)], env=environment, **pipes)
            pickle.dump(self.settings, self.child.stdin)
        child = self.child
        pickle.dump(job, child.stdin)
        child.stdin.flush()
        went_well, length = struct.unpack(">?I", _read(child, 5))
        return went_well, _read(child, length)

    def end(self) -> None:
        """Kill it; another one starts with the next job."""
        child, self.child = self.child, None
        if child is not None:
            child.kill()
            child.wait()
            child.stdout.close()


def _read(child: subprocess.Popen, length: int) -> bytes:
    data = child.stdout.read(length)
    if len(data) < length:
        raise EOFError
    return data


def work(begin: Callable[[Any], Callable[[Any], bytes]]) -> None:
    """Do jobs until the server ends; answers are plain bytes, since strangers' data has been at work here.

    Args:
        begin: Takes the settings and gives the function that does a job; what that raises as `ValueError` is said.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    if sys.platform != "win32":
        os.nice(5)  # who generates goes first
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    do = begin(pickle.load(jobs))
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        try:
            went_well, answer = True, do(job)
        except (ValueError, FileNotFoundError) as error:
            went_well, answer = False, str(error).encode()
        answers.write(struct.pack(">?I", went_well, len(answer)) + answer)
        answers.flush()
