"""Opening strangers' pictures in processes of their own, so that no picture takes time or memory from anybody else."""

import asyncio
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from PIL import Image

from ..image_files_mmgpt import ImageError, ImagePolicy


WORKER = Path(__file__).with_name("decoding_worker.py")
WORKERS = 2
SECONDS = 8.0  # for one picture; the slowest that is allowed takes 4 on a busy machine
MEMORY = 640 * 2**20  # bytes of a process that decodes; a progressive JPEG of 50 million pixels takes 550 MB
# numpy's threads would count as memory, and glibc would keep what a large picture took.
FRUGAL = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
MAX_FETCHING = 8  # pictures that are fetched at the same time


class PictureDecoder:
    """Opens pictures and cuts them to the square that the model sees, each in one of a few processes.

    A picture that takes too long or too much memory ends its process, and the next picture starts another. A process
    starts in a tenth of a second and holds 40 MB.

    Args:
        policy: What may be opened. Its `fetch` is called here, in a thread, not in the processes.
        seconds: What one picture may take.
        memory: Bytes that a process may hold; not kept on Windows.
        workers: How many pictures are decoded at the same time.
    """

    def __init__(
        self,
        policy: ImagePolicy,
        *,
        seconds: float = SECONDS,
        memory: int = MEMORY,
        workers: int = WORKERS,
    ):
        self.policy = policy
        self.limits = f"{seconds:g} seconds or {memory // 2**20} MiB"
        kept = {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "fetch"}
        self.workers = [_Worker((kept, seconds, memory)) for _ in range(workers)]
        self.idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.decoding = ThreadPoolExecutor(workers, thread_name_prefix="decoding")
        self.fetching = ThreadPoolExecutor(MAX_FETCHING, thread_name_prefix="fetching")

    async def squares(self, sources: Iterable[Any], size: int) -> list[Image.Image]:
        """Open pictures one after the other; when it is cancelled, those that have not begun are dropped.

        Args:
            sources: Each as for `open_image`, and such that it can be pickled.
            size: Side of the squares, in pixels: the image processor's.

        Returns:
            RGB pictures of `(size, size)`.

        Raises:
            ImageError: If one is refused, or takes too much.
            FileNotFoundError: If there is no such file.
        """
        return [await self._square(source, size) for source in sources]

    async def _square(self, source: Any, size: int) -> Image.Image:
        if self.policy.fetch is not None and isinstance(source, str) and source[:5].lower().startswith("http"):
            source = await asyncio.wrap_future(self.fetching.submit(self.policy.fetch, source, self.policy.max_bytes))
        return await asyncio.wrap_future(self.submit(source, size))

    def submit(self, source: Any, size: int) -> "Future[Image.Image]":
        """Open one picture, which is not fetched; as [`squares`], for whoever has no event loop."""
        return self.decoding.submit(self._decode, source, size)

    def _decode(self, source: Any, size: int) -> Image.Image:
        worker = self.idle.get()
        try:
            went_well, answer = worker.ask((source, size))
        except (EOFError, OSError):
            worker.end()
            raise ImageError(f"The picture takes more than {self.limits} to decode.") from None
        finally:
            self.idle.put(worker)
        if not went_well:
            raise ImageError(answer.decode())
        return Image.frombytes("RGB", (size, size), answer)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """End the processes with an application, as its `lifespan`."""
        yield
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for threads in (self.decoding, self.fetching):
            threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.end()


class _Worker:
    """A process that decodes, started by its first picture."""

    def __init__(self, settings: tuple):
        self.settings, self.process = settings, None

    def ask(self, job: tuple[Any, int]) -> tuple[bool, bytes]:
        """Let it decode; raises `EOFError` or `OSError` if it ends over it."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, **FRUGAL},
            )  # fmt: skip
            pickle.dump(self.settings, self.process.stdin)
        pickle.dump(job, self.process.stdin)
        self.process.stdin.flush()
        (length,) = struct.unpack(">I", self._read(4))
        answer = self._read(length)
        return answer[0] == 1, answer[1:]

    def _read(self, length: int) -> bytes:
        data = self.process.stdout.read(length)
        if len(data) < length:
            raise EOFError
        return data

    def end(self) -> None:
        """Kill it; another one starts with the next picture."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
