"""Opening pictures: the one place where a file or bytes of somebody else become a picture."""

import base64
import binascii
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


MAX_PIXELS = 64_000_000  # of one picture, read off its header before it is decoded


def open_picture(source: Image.Image | np.ndarray | str | os.PathLike | bytes) -> Image.Image:
    """Open one picture, wholly decoded.

    Args:
        source: A PIL picture, an array `(height, width)` or `(height, width, 3 or 4)` of bytes, a path, the bytes of
            a file, or a data URL.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `source` is something else.
        ValueError: If it is no picture, a truncated one, one of more than `MAX_PIXELS`, or a remote address: nothing
            is fetched from a network.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "picture bytes")
    if isinstance(source, str) and source.startswith("data:"):
        return _decode(io.BytesIO(_data_url(source)), "data URL")
    if isinstance(source, str | os.PathLike):
        reject_remote(source)
        with Path(source).open("rb") as file:
            return _decode(file, str(source))
    raise TypeError(f"A picture is a PIL picture, an array, a path, bytes or a data URL; got {type(source).__name__}.")


def reject_remote(source: str | os.PathLike) -> None:
    """Raise if a path is an address: nothing is fetched from a network."""
    if str(source).startswith(("http://", "https://", "ftp://", "file://")):
        raise ValueError(f"Nothing is fetched from {source!r}: load it yourself and give its content or a path.")


def _decode(file, name: str) -> Image.Image:
    try:
        picture = Image.open(file)
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels are more than the {MAX_PIXELS:,} that are read"
            )
        picture.load()
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no picture of a format we can read.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's, by format
        raise ValueError(f"{name} cannot be read as a picture, it may be damaged or cut short: {error}.") from None
    return picture


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            f"A picture array has shape (height, width) or (height, width, 3 or 4) and dtype uint8; got {array.shape} "
            f"and {array.dtype}."
        )
    return Image.fromarray(array)


def _data_url(url: str) -> bytes:
    header, _, data = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"A data URL of a picture has to be base64, got {header!r}.")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"The data URL is not valid base64: {error}") from None
