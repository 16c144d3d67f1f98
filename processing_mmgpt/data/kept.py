"""Stored tables in the cache of `datasets`, shared by processes and runs, and used only if unchanged."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock


HEAD = 2**12  # bytes in which the schema of a table stands


def table_folder(kind: str, *depends_on: Any) -> Path:
    """The folder of a table that depends on some values of JSON."""
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE, kind, digest)


def open_table(folder: Path, prepare: Callable[[], datasets.Dataset], check_rows: bool = True) -> datasets.Dataset:
    """Open the table in a folder. One that is missing or has changed is written again.

    Processes that ask for one table wait for each other.

    Args:
        folder: The folder, from [`table_folder`].
        prepare: Opens the table in `folder`, after writing it if it is missing.
        check_rows: Read and check all rows; else check only the number of bytes and the header, which costs
            nothing.

    Raises:
        OSError: If nothing can be written there, with a sentence.
    """
    digests = folder / "digests.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"Tables cannot be kept in {folder.parent}: {error}. Let HF_DATASETS_CACHE name a folder to write to."
        ) from error
    try:
        if not _is_whole(digests, check_rows):
            shutil.rmtree(folder)
        try:
            table = prepare()
        except (OSError, pa.ArrowInvalid):  # what was not checked is spoiled
            if not digests.exists():
                raise
            shutil.rmtree(folder)
            table = prepare()
        if not digests.exists():
            files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
            noted = {file.relative_to(folder).as_posix(): _digest(file, check_rows) for file in files}
            digests.write_text(json.dumps(noted), encoding="utf-8")
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    finally:
        lock.release()
    return table


def _is_whole(digests: Path, check_rows: bool) -> bool:
    """Whether all files are unchanged since the table was complete."""
    try:
        noted = json.loads(digests.read_text(encoding="utf-8"))
        return all(_digest(digests.parent / name, check_rows) == digest for name, digest in noted.items())
    except (FileNotFoundError, ValueError):
        return False


def _digest(path: Path, check_rows: bool) -> list:
    """Size and SHA-256 of a file; of rows that are not checked, of its beginning, which says how they are read."""
    with open(path, "rb") as file:
        content = io.BytesIO(file.read(HEAD)) if path.suffix == ".arrow" and not check_rows else file
        return [path.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()]
