"""Decodes pictures for `pictures.PictureDecoder`, one after the other, as a process that can be ended.

It is run by its path, and imports Pillow, numpy and one file of ours; the package itself would bring torch along.
Jobs come as pickles of the server on the standard input. Answers go back as plain bytes, because a stranger's picture
has been at work here: a length, whether it went well, and the pixels or a sentence.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import struct
import sys
from pathlib import Path


with contextlib.suppress(ImportError):  # Windows has no such limits
    import resource

sys.path.append(str(Path(__file__).parents[1]))

from image_files_mmgpt import ImageError, ImagePolicy, open_image, square  # noqa: E402


def main() -> None:
    """Take the settings, then a picture after the other, until the server ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    policy, seconds, memory = pickle.load(jobs)
    policy = ImagePolicy(**policy)
    if "resource" in globals():
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with open(os.devnull, "w") as nowhere, contextlib.suppress(EOFError):
        while True:
            source, size = pickle.load(jobs)
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)  # also in the midst of a decoder
            try:
                answer = b"\1" + square(open_image(source, policy), size).tobytes()
            except (ImageError, FileNotFoundError) as error:
                if isinstance(error.__cause__, MemoryError):
                    raise SystemExit from error
                answer = b"\0" + str(error).encode()
            faulthandler.cancel_dump_traceback_later()
            answers.write(struct.pack(">I", len(answer)) + answer)
            answers.flush()


if __name__ == "__main__":
    main()
