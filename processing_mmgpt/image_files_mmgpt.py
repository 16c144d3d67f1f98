"""Open pictures: the one place where files or bytes become a picture."""

import base64
import binascii
import io
import os
import re
import reprlib
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


if TYPE_CHECKING:
    import torch  # not needed to run: a process that only decodes imports this file and no torch

MAX_RESIZED = 64_000_000  # pixels that a long and thin picture may have once its short side is resized
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # Pillow's modes of colours that are multiplied by their opacity


class ImageError(ValueError):
    """A picture that is refused. The message says which and why, and tells nothing of the decoder or the network."""


@dataclass(frozen=True)
class ImagePolicy:
    """What may be opened as a picture. The default is for pictures of strangers, as in a server.

    Bytes and data URLs are always opened, within the limits.

    Args:
        paths: Open files of this machine by their paths.
        fetch: `(address, max_bytes)` to the bytes of a file, for `http` and `https` addresses, such as
            `functools.partial(processing_mmgpt.serving.fetching.fetch, hosts=["example.org"])`; by default none is
            opened.
        formats: The formats that are decoded, by Pillow's names.
        max_bytes: Size of the largest file.
        max_pixels: Pixels of the largest picture, read off its header before anything is decoded.
    """

    paths: bool = False
    fetch: Callable[[str, int], bytes] | None = None
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF")
    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000


OWN_IMAGES = ImagePolicy(
    paths=True,
    formats=(*ImagePolicy.formats, "BMP", "TIFF", "PPM", "JPEG2000"),
    max_bytes=2**30,
    max_pixels=64_000_000,
)


def open_image(source: Any, policy: ImagePolicy = OWN_IMAGES) -> Image.Image:
    """Open one picture and decode it, with 8 bits a channel, turned upright by its EXIF orientation.

    Args:
        source: A PIL picture; an array `(height, width)` or `(height, width, 1, 3 or 4)`, or a tensor with its
            channels first, of whole numbers of 8 or 16 bits or of truth values; a path; the bytes of a file; either as
            `datasets` has them, `{"bytes": ..., "path": ...}`; a data URL, or an `http` or `https` address. Of 16 bits
            the high byte is used.
        policy: What may be opened; by default the caller's own pictures: files by their paths, no addresses.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `source` is something else.
        ImageError: If it is refused by the policy, is not a picture, is animated, damaged or truncated, or has no
            known range of values.
    """
    if isinstance(source, dict) and source and source.keys() <= {"bytes", "path"}:
        source = _from_column(source)
    if isinstance(source, Image.Image):
        return _finish(source, "The picture")
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return _from_array(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), len(source), "The picture", policy)
    if isinstance(source, str) and (scheme := re.match(r"\s*([a-zA-Z][\w+.-]+):", source)):  # C: is a drive
        return _from_url(source, scheme[1].lower(), policy)
    if isinstance(source, str | os.PathLike):
        return _from_path(source, policy)
    raise TypeError(
        "A picture is a PIL picture, an array, a tensor, a path, bytes, a data URL or an address; got "
        f"{type(source).__name__}."
    )


def square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side of an upright picture, crop its centre, and bring it to RGB, as open_clip does.

    Args:
        image: As [`open_image`] gives it; a square RGB one of this size stays as it is.
        size: Side of the result, in pixels.

    Raises:
        ImageError: If the picture is so long and thin that resizing it would take gigabytes.
    """
    return _crop_centre(_resize_short_side(image, size), size).convert("RGB")


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """As torchvision's `Resize(size)`: the short side becomes `size`, the long one is cut to whole pixels."""
    width, height = image.size
    if min(width, height) == size:
        return image
    short, long = sorted((width, height))
    long = int(size * long / short)
    if size * long > MAX_RESIZED:
        raise ImageError(f"The picture of {width} x {height} pixels is too long and thin: cut it.")
    return image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)


def _crop_centre(image: Image.Image, size: int) -> Image.Image:
    """As torchvision's `CenterCrop(size)`, which rounds the offset half to even."""
    left, top = (int(round((side - size) / 2.0)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _is_tensor(source: Any) -> bool:
    """Whether it is a tensor of torch; without torch imported, nothing is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _from_column(source: dict[str, Any]) -> Any:
    """What a column of `datasets.Image(decode=False)` holds."""
    data = source.get("bytes")
    if data is not None and not isinstance(data, bytes):
        raise TypeError(f"The `bytes` of a picture have to be bytes; got {type(data).__name__}.")
    return source.get("path") if data is None else data


def reject_remote(path: str | os.PathLike) -> None:
    """Raise if the path of a video is an address: no video is fetched from a network."""
    if re.match(r"\s*[a-zA-Z][\w+.-]+:", str(path)):
        raise ImageError(f"Videos are not fetched from {shorten(str(path))}: load it yourself and give its bytes.")


def _from_url(url: str, scheme: str, policy: ImagePolicy) -> Image.Image:
    if scheme == "data":
        data = _data_url(url, policy.max_bytes)
        return _decode(io.BytesIO(data), len(data), "The picture in the data URL", policy)
    if policy.fetch is None:
        own = "load it yourself and give the picture or a path" if policy.paths else "send it as a data URL"
        raise ImageError(f"Pictures are not fetched from {shorten(url)}: {own}.")
    data = policy.fetch(url, policy.max_bytes)
    return _decode(io.BytesIO(data), len(data), f"The picture at {shorten(url)}", policy)


def _from_path(path: str | os.PathLike, policy: ImagePolicy) -> Image.Image:
    if not policy.paths:
        raise ImageError("Pictures are not read from paths here: send them as data URLs.")
    with open_file(path) as file:
        return _decode(file, os.fstat(file.fileno()).st_size, str(path), policy)


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading. A named pipe or a device is refused.

    Raises:
        FileNotFoundError: If there is no such file.
        ImageError: If it is not a regular file, or cannot be opened.
    """
    try:
        file = open(path, "rb", opener=_open_without_waiting)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a folder, a name too long or with a null in it, no permission
        raise ImageError(f"{shorten(str(path))} cannot be opened as a file.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ImageError(f"{shorten(str(path))} is no file.")
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would wait for its writer


def _data_url(url: str, max_bytes: int) -> bytes:
    header, _, data = url.partition(",")
    if not re.fullmatch(r"data:(image/[\w.+-]+)?;base64", header, re.IGNORECASE):
        raise ImageError(f"A data URL of a picture begins with data:image/...;base64, and not with {shorten(header)}.")
    if len(data) // 4 * 3 > max_bytes + 2:
        raise ImageError(f"The picture in the data URL is larger than the {max_bytes:,} bytes that are read.")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("The data URL is not valid base64.") from None


def _decode(file, size: int, name: str, policy: ImagePolicy) -> Image.Image:
    if size > policy.max_bytes:
        raise ImageError(f"{name} has {size:,} bytes, more than the {policy.max_bytes:,} that are read.")
    try:
        image = Image.open(file, formats=policy.formats)
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no picture of a format that is read: {', '.join(policy.formats)}.") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more pixels than the {policy.max_pixels:,} that are read.") from None
    except Exception as error:  # a decoder raises whatever the byte that is wrong leads to
        raise ImageError(_damaged(name)) from error
    if image.width * image.height > policy.max_pixels:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels, more than the {policy.max_pixels:,} that are read."
        )
    return _finish(image, name)


def _finish(image: Image.Image, name: str) -> Image.Image:
    """Decode a picture that Pillow has opened, turn it upright, and bring it to 8 bits; every source ends here."""
    try:
        # MPO is a camera's JPEG, with previews after it.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
        if not is_animated:
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # a decoder, as above; and EXIF is a format of its own
        raise ImageError(_damaged(name)) from error
    if is_animated:
        raise ImageError(f"{name} is animated or has several pages: give one of them as a picture of its own.")
    if image.mode in ("I", "F"):
        raise ImageError(f"{name} has 32 bits a pixel, without a known range: save it with 8 bits.")
    if image.mode.startswith("I;16"):
        return _high_byte(np.asarray(image))
    return image.convert(STRAIGHT[image.mode]) if image.mode in STRAIGHT else image


def _damaged(name: str) -> str:
    return f"{name} cannot be read as a picture, it may be damaged or cut short."


def _high_byte(array: np.ndarray) -> Image.Image:
    """Take the high byte, as Pillow does for 16-bit colour; grey it would silently clip to white."""
    return Image.fromarray((array >> 8).astype(np.uint8))


def _from_array(array: "np.ndarray | torch.Tensor") -> Image.Image:
    found, kind = f"got {tuple(array.shape)} of {array.dtype}", str(array.dtype).removeprefix("torch.")
    if isinstance(array, np.ndarray):
        kind = array.dtype.name  # in whatever order of bytes
    if kind not in ("uint8", "uint16", "bool"):
        raise ImageError(
            f"A picture array holds whole numbers of 8 or 16 bits, uint8 or uint16; {found}, without a known range: "
            "values from 0 to 1 become such by `(255 * array).round().astype(np.uint8)`."
        )
    if not isinstance(array, np.ndarray):
        array = array.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            "A picture array has shape (height, width) or (height, width, 1, 3 or 4), a tensor its channels first; "
            f"{found}."
        )
    if array.size == 0:
        raise ImageError(f"A picture array has to hold pixels; {found}.")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if kind == "uint16":
        return _high_byte(array)
    return Image.fromarray(array.astype(np.uint8) * 255 if kind == "bool" else np.ascontiguousarray(array))


def shorten(value: Any, length: int = 80) -> str:
    """Quote a value in a message, cut to one line, however large or deep it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= length else value[:length] + "...")
    quote = reprlib.Repr()
    quote.maxlevel, quote.maxstring, quote.maxother = 3, length, length
    quoted = quote.repr(value)
    return quoted if len(quoted) <= 2 * length else quoted[: 2 * length] + "..."
