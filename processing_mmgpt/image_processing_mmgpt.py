"""Pictures and videos to pixels, bit for bit as open_clip's evaluation transform."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .image_files_mmgpt import open_image, square
from .messages_mmgpt import Latents, Video
from .videos_mmgpt import open_video


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class MMGPTImageProcessor(BaseImageProcessor):
    """Resize the short side, crop the centre, convert to RGB, normalise.

    This is open_clip's order, in which the conversion to RGB comes after resizing:
    https://github.com/mlfoundations/open_clip/blob/v3.3.0/src/open_clip/transform.py. One thing differs: a picture is
    first turned upright by its EXIF orientation, which open_clip ignores.

    Args:
        size: Side of the square result, in pixels.
        image_mean: Mean of each channel, of values in 0..1.
        image_std: Standard deviation of each channel.
        video_fps: Frames a second to take from a video file.
        max_num_frames: The most frames of a video file; `None` for no limit. Where the model has frame embeddings,
            at most `config.resampler["max_num_frames"]`.

    Raises:
        ValueError: On an unknown argument, or on a wrong size, mean or deviation.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int = 224,
        image_mean: tuple[float, float, float] = CLIP_MEAN,
        image_std: tuple[float, float, float] = CLIP_STD,
        video_fps: float = 1.0,
        max_num_frames: int | None = 8,
        **kwargs,
    ):
        kwargs = {key: value for key, value in kwargs.items() if key not in ("image_processor_type", "auto_map")}
        if kwargs:
            raise ValueError(f"MMGPTImageProcessor does not know {sorted(kwargs)}.")
        channels = (
            [*image_mean, *image_std] if all(isinstance(v, list | tuple) for v in (image_mean, image_std)) else []
        )
        if type(size) is not int or size < 1:
            raise ValueError(f"The size of a picture has to be a whole number from 1 on, got {size!r}.")
        if len(channels) != 6 or not all(type(v) in (int, float) and abs(v) < float("inf") for v in channels):
            raise ValueError(
                f"Mean and deviation have to be three numbers each, got {image_mean!r} and {image_std!r}."
            )
        if min(image_std) <= 0:
            raise ValueError(f"Deviations have to be above 0, got {image_std!r}.")
        self.size = size
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        if video_fps <= 0 or (max_num_frames is not None and max_num_frames < 1):
            raise ValueError(f"video_fps is {video_fps}, max_num_frames {max_num_frames}; both have to be positive.")
        self.video_fps = video_fps
        self.max_num_frames = max_num_frames

    def pixels(self, picture: Any) -> torch.Tensor:
        """Turn one picture, given in any form of `open_image`, into floats `(3, size, size)`."""
        pixels = torch.from_numpy(np.array(self.square(open_image(picture))))  # (size, size, 3), bytes
        pixels = pixels.permute(2, 0, 1).contiguous()  # (3, size, size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return pixels.float().div(255).sub(mean).div(std)

    def frames(self, image: Any) -> torch.Tensor:
        """Turn an image or a video into floats `(F, 3, size, size)`.

        Args:
            image: An image, with `F` = 1; a list of images, the frames of a video, all of which are used; or a
                [`~processing_mmgpt.messages_mmgpt.Video`], which is sampled at `video_fps`.
        """
        if isinstance(image, Video):
            image = open_video(image.source, self.video_fps, self.max_num_frames)
        if isinstance(image, list | tuple):
            if not image:
                raise ValueError("A video needs at least one frame; the list is empty.")
            return torch.stack([self.pixels(frame) for frame in image])
        return self.pixels(image)[None]

    def stack(self, images: list[list]) -> dict[str, torch.Tensor]:
        """Stack the images of each row, with zeros where a row has fewer.

        Args:
            images: For each row its images and videos, in the forms of [`frames`]; or for all rows
                [`~processing_mmgpt.messages_mmgpt.Latents`].

        Returns:
            Nothing if no row has an image; else `pixel_values` `(B, M, 3, size, size)`, or with a video
            `(B, M, F, 3, size, size)` and `num_frames` `(B, M)`; of latents, `image_latents` `(B, M, N, D_vision)`.

        Raises:
            ValueError: If there are both latents and images; or as [`frames`], with the row.
        """
        flat = [image for row in images for image in row]
        if not flat:
            return {}
        if any(isinstance(image, Latents) for image in flat):
            if not all(isinstance(image, Latents) for image in flat):
                raise ValueError("Some pictures of the batch are latents and some are not: give either for all.")
            return {"image_latents": _stacked([[image.tensor for image in row] for row in images])}
        frames: list[list[torch.Tensor]] = []  # each (F, 3, size, size)
        for number, row in enumerate(images):
            try:
                frames.append([self.frames(image) for image in row])
            except ValueError as error:
                raise ValueError(f"Row {number}: {error}") from error
        pixel_values = _stacked(frames)
        if not any(isinstance(image, list | tuple | Video) for image in flat):
            return {"pixel_values": pixel_values[:, :, 0]}
        num_frames = [[len(one) for one in row] + [1] * (pixel_values.shape[1] - len(row)) for row in frames]
        return {"pixel_values": pixel_values, "num_frames": torch.tensor(num_frames)}

    def square(self, image: Image.Image) -> Image.Image:
        """Resize, crop and convert an upright picture to the RGB picture `(size, size)` that the model sees.

        A square RGB picture of that size stays as it is, so a server can store the result in place of the original.

        Raises:
            ImageError: If the picture is so long and thin that resizing it would take gigabytes.
        """
        return square(image, self.size)

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """Turn a picture or a list of pictures into `pixel_values` `(K, 3, size, size)`."""
        images = images if isinstance(images, list | tuple) else [images]
        return BatchFeature({"pixel_values": torch.stack([self.pixels(image) for image in images])})

    __call__ = preprocess


def _stacked(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """Stack tensors that may differ in their first dimension to `(B, M, ...)`, with zeros where a row has none."""
    flat = [one for row in rows for one in row]
    stacked = flat[0].new_zeros(len(rows), max(map(len, rows)), max(map(len, flat)), *flat[0].shape[1:])
    for number, row in enumerate(rows):
        for column, one in enumerate(row):
            stacked[number, column, : len(one)] = one
    return stacked


def image_format(vision: Any, vision_config: str | dict | None) -> dict[str, Any]:
    """Size, and if known mean and deviation, of the images that a tower is trained on.

    A folder of transformers has them in its `preprocessor_config.json`; without one, its config has the size.

    Args:
        vision: As for `MMGPTForConditionalGeneration.from_vision_text_pretrained`.
        vision_config: Likewise.

    Returns:
        Arguments of [`MMGPTImageProcessor`].
    """
    if vision_config is None:
        full = AutoConfig.from_pretrained(vision)
        size = {"size": getattr(full, "vision_config", full).image_size}
        try:
            own, _ = BaseImageProcessor.get_image_processor_dict(vision)
        except OSError:  # a tower saved without an image processor
            return size
        sizes = own.get("crop_size") or own.get("size") or size["size"]  # a number, or by the names of its sides
        if isinstance(sizes, dict):
            sizes = sizes.get("height") or sizes.get("shortest_edge")
        return {"size": sizes, "image_mean": own["image_mean"], "image_std": own["image_std"]}
    if isinstance(vision_config, str):
        try:
            import open_clip
        except ImportError as error:
            raise ImportError("Reading an open_clip model name needs `pip install open_clip_torch`.") from error
        vision_config = open_clip.get_model_config(vision_config)
    return {"size": vision_config.get("vision_cfg", vision_config)["image_size"]}
