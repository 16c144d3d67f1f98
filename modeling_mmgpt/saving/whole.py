"""Files and folders that are complete or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file or a folder that takes its name only when all of it is written, and is removed otherwise.

        with whole("scores.json") as unfinished:
            unfinished.write_text("{}")
        with whole("outputs/model") as unfinished:
            model.save_pretrained(unfinished)

    A file replaces an existing one. A folder replaces an empty one only.

    Args:
        path: The name to take. Folders above it are made.

    Yields:
        A free name on the same disk, for the file or the folder to be written by.

    Raises:
        OSError: If `path` is a folder that is not empty; it stays as it is.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        os.replace(unfinished, path)


def check_free(path: str | os.PathLike) -> None:
    """Check before long work that its output folder can be made.

    Raises:
        FileExistsError: If it is a file, or a folder that is not empty.
    """
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise FileExistsError(f"{path} exists already: give a new folder.")
