"""Confine the pictures and videos of a record to the folder of its pictures."""

import os
import re
from pathlib import Path
from typing import Any

from ..image_files_mmgpt import shorten
from ..messages_mmgpt import Video


# Nothing, an absolute path, a drive, a step up; with either slash, since the file may come from another system.
LEAVING = re.compile(r"^$|^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.($|[/\\])|\0")


def confine(image: Any, root: str | None) -> Any:
    """Take a picture or a video of a record, with every path in it below a root. Nothing is opened.

    Args:
        image: A path, a data URL, the bytes of a file, a picture of `datasets` that is not decoded; a list of these,
            the frames of a video; or a `Video` of one of them.
        root: The folder; `None` to refuse all paths.

    Returns:
        A path that is surely below `root`, a data URL or bytes; a list of these; or a `Video` of one.

    Raises:
        ValueError: If it is something else, or if a path leaves `root`, as "reason: details".
    """
    if isinstance(image, Video):
        return Video(_confine_file(image.source, root))
    if isinstance(image, list | tuple):
        return [_confine_file(frame, root) for frame in image]
    return _confine_file(image, root)


def _confine_file(file: Any, root: str | None) -> str | bytes:
    if isinstance(file, dict):  # a picture of `datasets` that is not decoded
        file = file.get("path") if file.get("bytes") is None else _bytes(file["bytes"])
    if isinstance(file, bytes) or (isinstance(file, str) and file.startswith("data:")):
        return file
    if not isinstance(file, str):
        raise ValueError(f"A picture has to be a path, a data URL or bytes: got {shorten(file)}")
    if root is None:
        raise ValueError("The record has a picture, but its source has no image_root.")
    return confined(root, file)


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise ValueError(f"The `bytes` of a picture are no bytes: got {shorten(data)}; JSON takes a data URL")
    return data


def confined(root: str, path: str) -> str:
    """Join the path of a picture to its root.

    Links are resolved at each call. Whoever may write below the root can still put one there between this and the
    opening of the file.

    Raises:
        ValueError: If the path is absolute, goes up, or leads out of the root by a symbolic link.
    """
    if not isinstance(path, str):
        raise ValueError(f"A picture's path is no string: got {shorten(path)}")
    if LEAVING.search(path):
        raise ValueError(f"A picture's path leaves the image root: {shorten(path)}")
    joined = root
    for name in Path(path).parts:  # below the root alone: to resolve all of the path would look at each folder above
        joined = os.path.join(joined, name)
        if os.path.islink(joined) and not _is_below(root, os.path.join(root, path)):
            raise ValueError(f"A picture's path leaves the image root: {shorten(path)} is a link to the outside")
    return os.path.join(root, path)


def _is_below(root: str, path: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), ""))
