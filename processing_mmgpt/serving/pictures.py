"""Opening strangers' pictures in processes of their own, so that no picture takes time or memory from anybody else."""

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_files_mmgpt import ImagePolicy
from .processes import Processes


WORKER = Path(__file__).with_name("decoding_worker.py")
SECONDS = 8.0  # for one picture; the slowest that is allowed takes 4 on a busy machine
MEMORY = 640 * 2**20  # bytes of a process that decodes; a progressive JPEG of 50 million pixels takes 550 MB
MAX_FETCHING = 8  # pictures that are fetched at the same time


class PictureDecoder:
    """Opens pictures and cuts them to the square that the model sees, each in one of a few processes.

    A picture that takes too long or too much memory ends its process, and the next picture starts another. A process
    starts in a tenth of a second and holds 35 MB.

    Args:
        policy: What may be opened. Its `fetch` is called here, in a thread, not in the processes.
        seconds: What one picture may take.
        memory: Bytes that a process may hold; not kept on Windows.
        workers: How many pictures are decoded at the same time.
    """

    def __init__(self, policy: ImagePolicy, *, seconds: float = SECONDS, memory: int = MEMORY, workers: int = 2):
        self.policy = policy
        kept = {field.name: getattr(policy, field.name) for field in fields(policy) if field.name != "fetch"}
        ended = f"The picture takes more than {seconds:g} seconds or {memory // 2**20} MiB to decode."
        self.processes = Processes(WORKER, (kept, seconds, memory), workers, ended)
        self.fetching = ThreadPoolExecutor(MAX_FETCHING)

    async def squares(self, sources: Iterable[Any], size: int) -> list[Image.Image]:
        """Open pictures one after the other; when it is cancelled, those that have not begun are dropped.

        Args:
            sources: Each as for `open_image`, and such that it can be pickled.
            size: Side of the squares, in pixels: the image processor's.

        Returns:
            RGB pictures of `(size, size)`.

        Raises:
            ValueError: If one is refused, is not found, or takes too much.
        """
        pictures = []
        for source in sources:
            if self.policy.fetch is not None and isinstance(source, str) and source[:4].lower() == "http":
                fetched = self.fetching.submit(self.policy.fetch, source, self.policy.max_bytes)
                source = await asyncio.wrap_future(fetched)
            pictures.append(Image.frombytes("RGB", (size, size), await self.processes.do((source, size))))
        return pictures

    def check(self, source: Any) -> None:
        """Raise what [`squares`] would raise for a picture; for whoever has no event loop."""
        self.processes.submit((source, 1)).result()

    def close(self) -> None:
        """End the processes."""
        self.processes.close()
        self.fetching.shutdown(wait=False, cancel_futures=True)
