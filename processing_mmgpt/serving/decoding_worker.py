"""The program of the processes of `pictures.PictureDecoder`: opens one picture after the other.

It is run by its path, and imports Pillow, numpy and files without torch; the package itself would bring that along.
"""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


with contextlib.suppress(ImportError):  # Windows has no such limits
    import resource

sys.path.append(str(Path(__file__).parents[1]))

from image_files_mmgpt import ImageError, ImagePolicy, open_image, square  # noqa: E402
from serving.processes import work  # noqa: E402


def begin(settings: tuple[dict[str, Any], float, int]) -> Callable[[tuple[Any, int]], bytes]:
    """Take the fields of the policy, the seconds of one picture and the bytes of memory; gives what opens pictures."""
    fields, seconds, memory = settings
    policy, nowhere = ImagePolicy(**fields), open(os.devnull, "w")
    if "resource" in globals():
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    def pixels(job: tuple[Any, int]) -> bytes:
        source, size = job
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)  # also in the midst of a decoder
        try:
            return square(open_image(source, policy), size).tobytes()
        except ImageError as error:
            if isinstance(error.__cause__, MemoryError):
                raise SystemExit from error
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()

    return pixels


if __name__ == "__main__":
    work(begin)
