"""The program of the process of `rendering.Renderer`: renders one conversation after the other."""

import json
import sys
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))

from processing_mmgpt import MMGPTProcessor  # noqa: E402
from processing_mmgpt.serving.processes import work  # noqa: E402
from processing_mmgpt.serving.rendering import render  # noqa: E402


def begin(processor: MMGPTProcessor) -> Callable[[tuple[list[dict], int]], bytes]:
    """Take the processor; gives what renders conversations, for a model with so much room."""
    return lambda job: json.dumps(render(job[0], processor, job[1])).encode()


if __name__ == "__main__":
    work(begin)
