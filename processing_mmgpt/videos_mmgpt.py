"""Open videos: a file becomes a few frames, under the policy of `image_files_mmgpt`."""

import io
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import Image

from .image_files_mmgpt import OWN_IMAGES, open_file, reject_remote


MAX_PIXELS = OWN_IMAGES.max_pixels  # of a frame
MAX_FRAMES = 108_000  # of one video, an hour of 30 a second; counted before any is decoded
# Containers that hold their own pictures. A playlist (HLS, concat) would open other files, or addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
# No protocol of FFmpeg's is needed, for the file is opened by us.
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}


def open_video(
    source: str | os.PathLike | bytes, fps: float = 1.0, max_num_frames: int | None = None
) -> list[Image.Image]:
    """Sample and decode frames of a video at a given rate.

    The k-th frame is the one shown `k / fps` seconds after the first. If these are more than `max_num_frames`, that
    many are taken at equal distances over the whole video. Flamingo takes 1 frame a second (section 3.1:
    https://arxiv.org/abs/2204.14198).

    Args:
        source: A path, or the bytes of a file.
        fps: Frames a second.
        max_num_frames: The most frames to take; `None` for no limit.

    Returns:
        At least one frame, upright.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If PyAV is missing.
        TypeError: If `source` is something else.
        ValueError: If it is not a video, is damaged or cut short (where the container tells the number of its frames:
            Matroska and MPEG-TS do not), has too many or too large frames, or is a remote address: nothing is
            fetched from a network.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading a video file needs PyAV: `pip install av`, or give a list of frames.") from error
    name = "video bytes" if isinstance(source, bytes) else str(source)
    with _open_file(source) as file:
        try:
            with av.open(file, options=OPTIONS) as container:
                return _sample(container, fps, max_num_frames)
        except (av.FFmpegError, ValueError, OSError) as error:
            raise ValueError(f"{name} cannot be read as a video, it may be damaged or cut short: {error}.") from None


def _open_file(source: str | os.PathLike | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"A video is a path, bytes or a list of frames; got {type(source).__name__}.")
    reject_remote(source)
    return open_file(source)


def _sample(container: Any, fps: float, max_num_frames: int | None) -> list[Image.Image]:
    if not container.streams.video:
        raise ValueError("it holds no pictures")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError("its pictures are in a format that is not known")
    times = _sample_times(_duration(container, stream), fps, max_num_frames)
    container.seek(stream.start_time or 0, stream=stream)
    return list(_frames_at(container.decode(stream), times))


def _duration(container: Any, stream: Any) -> Fraction:
    """Seconds from the first frame to the end of the last, read off the packets; nothing is decoded.

    Raises:
        ValueError: If the frames are too large, too many, or fewer than the file says it holds.
    """
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are read")
    count, start, end = 0, math.inf, -math.inf
    for packet in container.demux(stream):
        if packet.pts is None:  # the last, which only says that it is the last
            continue
        count, start, end = count + 1, min(start, packet.pts), max(end, packet.pts + (packet.duration or 0))
        if count > MAX_FRAMES:
            raise ValueError(f"it has more than the {MAX_FRAMES:,} frames that are read")
    if count == 0 or count < stream.frames:
        raise ValueError(f"it holds {count} frames and says {stream.frames}")
    return (end - start) * stream.time_base


def _sample_times(duration: Fraction, fps: float, max_num_frames: int | None) -> list[Fraction]:
    """Seconds after the first frame at which to sample."""
    count = max(1, math.ceil(duration * Fraction(fps)))
    if max_num_frames is None or count <= max_num_frames:
        if count > MAX_FRAMES:  # a file may claim any duration
            raise ValueError(f"{fps} frames a second of it are {count:,}, more than the {MAX_FRAMES:,} that are read")
        return [k / Fraction(fps) for k in range(count)]
    return [k * duration / max_num_frames for k in range(max_num_frames)]


def _frames_at(frames: Iterator[Any], times: list[Fraction]) -> Iterator[Image.Image]:
    """The frame that is shown at each of the times."""
    start, shown, waiting = None, None, iter(times)
    time = next(waiting)
    for frame in frames:
        if frame.width * frame.height > MAX_PIXELS:  # it may change on the way
            raise ValueError(f"a frame has more than the {MAX_PIXELS:,} pixels that are read")
        if frame.pts is None:
            raise ValueError("a frame does not say when it is shown")
        now = frame.pts * frame.time_base
        start = now if start is None else start
        while now - start > time:
            yield _upright(shown)
            time = next(waiting, None)
            if time is None:
                return
        shown = frame
    if shown is None:
        raise ValueError("none of its frames can be decoded")
    yield from (_upright(shown) for _ in (time, *waiting))


def _upright(frame: Any) -> Image.Image:
    """Rotate a frame by the tag of its file, as `exif_transpose` does with a picture."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
