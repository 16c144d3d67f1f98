"""Files and folders that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file or a folder that takes its name only when all of it is written, and else disappears.

        with whole("scores.json") as unfinished:
            unfinished.write_text("{}")
        with whole("outputs/model") as unfinished:
            model.save_pretrained(unfinished)

    A file takes the place of the one that was there. A folder takes none but that of an empty one.

    Args:
        path: The name to take. Folders above it are made.

    Yields:
        A free name on the same disk, for the file or the folder to be written by.

    Raises:
        OSError: If `path` is a folder that holds something; what is in it stays.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        os.replace(unfinished, path)


def check_free(path: str | os.PathLike) -> None:
    """Look, before a long work, whether its folder can be made.

    Raises:
        FileExistsError: If a file stands there, or a folder that holds something.
    """
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise FileExistsError(f"{path} exists already: give a new folder.")
