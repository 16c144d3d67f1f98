"""Which token attends to which image: pure functions of the ids.

Flamingo, section 3.1.3: https://arxiv.org/abs/2204.14198.

Letters: `B` rows, `T` text tokens, `M` images in a row, `N` latents.
"""

from typing import NamedTuple

import torch

from .packing_mmgpt import images_of_document


class ImagePlan(NamedTuple):
    """The result of [`plan_images`]."""

    index: torch.Tensor  # (B, T), the image each token attends to, see `compute_image_index`
    numbers: torch.Tensor  # (B, M), the number of each new picture in its row, 0 for padding
    must_recompute: bool  # the new pictures change what the tokens in the cache should have been


def plan_images(
    is_image: torch.Tensor,
    num_images: int,
    media_attention: str,
    *,
    before: torch.Tensor | None = None,
    cached: torch.Tensor | None = None,
    continues: bool = False,
    document_index: torch.Tensor | None = None,
) -> ImagePlan:
    """Check that tokens and pictures agree, and find what each token attends to and whether to recompute the cache.

    Args:
        is_image: Bool `(B, T)`, true at `<image>` tokens.
        num_images: `M`, the new pictures given for each row.
        media_attention: `"preceding"`, `"all_preceding"` or `"following"`.
        before: `(B,)`, the images of each row before these tokens; `None` if the rows begin here.
        cached: `(B,)`, the images of each row whose keys and values are cached; `None` for none.
        continues: Whether the rows continue from tokens in a cache. Then every picture has to be new: without one, a
            row may hold fewer tokens than pictures, as rows of one batch differ.
        document_index: `(B, T)`, the document of each token in packed rows; `None` where a row is one document.

    Raises:
        ValueError: If a row has more new `<image>` tokens than pictures, with the row and both numbers; or if there
            are pictures without a token in any row. Not in compiled code, which cannot read numbers.
    """
    index = compute_image_index(is_image, media_attention, before, document_index)
    numbers = compute_image_numbers(index, num_images, cached)
    if torch.compiler.is_compiling():
        return ImagePlan(index, numbers, must_recompute=False)
    zero = is_image.new_zeros(len(is_image), dtype=torch.long)
    before, cached = (zero if given is None else given.to(zero.device) for given in (before, cached))
    new_images = before + is_image.sum(dim=1) - cached  # (B,)
    _check_counts(new_images.tolist(), num_images, continues)
    # In `following` a new image is the one that the tokens before it attend to; in the other modes only a document's
    # first image changes them, by turning the feed-forward half on.
    changes = (new_images > 0) & ((cached == 0) | (media_attention == "following"))
    return ImagePlan(index, numbers, must_recompute=continues and bool(changes.any()))


def _check_counts(new_images: list[int], num_images: int, continues: bool) -> None:
    for row, count in enumerate(new_images):
        if count > num_images or count < 0:
            raise ValueError(
                f"Row {row} holds {count} new <image> tokens, but {num_images} pictures were given for it. Give one "
                "picture for each <image> token that is not in the cache yet."
            )
    if continues and max(new_images) < num_images:
        raise ValueError(
            f"{num_images} pictures were given, but no row holds more than {max(new_images)} <image> tokens that are "
            "not in the cache: give the new pictures only."
        )


def compute_image_index(
    is_image: torch.Tensor,
    media_attention: str,
    past_images: torch.Tensor | None = None,
    document_index: torch.LongTensor | None = None,
) -> torch.Tensor:
    """Number the image that each token attends to; images are counted along the row.

    A row of text, its `<image>` tokens as `#`, and what each mode makes of it:

        tokens           a  b  #  c  d  #  e  f
        preceding        0  0  1  1  1  2  2  2     the most recent image at or before the token
        all_preceding    0  0  1  1  1  2  2  2     the same number; every image up to it is attended
        following        1  1  1  2  2  2  0  0     the next image, an `<image>` token its own
        a row without   -1 -1 -1 -1 -1 -1 -1 -1     the blocks are off: the row is the bare LM's

    0 attends to no image: the attention half of a block adds nothing, its feed-forward half acts, as in the reference,
    whose weights expect it. A continuation counts from the images before it: `e f` alone, with
    `past_images` 2, gives `2 2`, `2 2` and `0 0`. In a packed row each document counts by itself:

        document_index   1  1  1  1  2  2  3  3  3  3
        tokens           a  #  b  c  d  e  f  #  g  h
        preceding        0  1  1  1 -1 -1  0  2  2  2
        following        1  1  0  0 -1 -1  2  2  0  0

    Args:
        is_image: Bool `(B, T)`, true at `<image>` tokens.
        media_attention: `"preceding"`, `"all_preceding"` or `"following"`.
        past_images: `(B,)`, the images of each row before these tokens; `None` for none.
        document_index: `(B, T)`, the document of each token in a packed row; `None` where a row is one document.

    Returns:
        Integers `(B, T)`: -1, 0, or the number k >= 1 of an image of the row.
    """
    if past_images is None:
        past_images = is_image.new_zeros(len(is_image), dtype=torch.long)
    seen = past_images[:, None] + is_image.cumsum(dim=1)  # (B, T), images at or before each token
    if document_index is None:
        before, total = torch.zeros_like(seen[:, -1:]), seen[:, -1:]  # (B, 1), those of the token's document
    else:
        before, total = images_of_document(is_image, document_index)  # (B, T)
    if media_attention == "following":
        ahead = seen - is_image.long() + 1  # one more than the images before the token
        index = ahead.where(ahead <= total, 0)
    else:
        index = seen.where(seen > before, 0)
    return index.where(total > before, -1)


def compute_image_numbers(
    index: torch.Tensor, num_images: int, past_images: torch.Tensor | None = None
) -> torch.Tensor:
    """Number the pictures of each row; a picture without an `<image>` token gets 0 and is never attended to.

    Args:
        index: `(B, T)` from [`compute_image_index`].
        num_images: `M`, the pictures given for each row.
        past_images: `(B,)`, the images of each row before these; `None` for none.

    Returns:
        Integers `(B, M)`: the number of the image in its row, or 0.
    """
    numbers = torch.arange(1, num_images + 1, device=index.device).expand(len(index), -1)  # (B, M)
    if past_images is not None:
        numbers = numbers + past_images[:, None]
    return numbers.where(numbers <= index.amax(dim=1, keepdim=True), 0)


def continue_image_index(index: torch.Tensor, start: int, end: int, media_attention: str) -> torch.Tensor:
    """Cut tokens `start` to `end` out of `(B, T)`, continued for tokens after it that have no picture of their own.

    An `<image>` among those, generated or looked up, stands for no picture and changes nothing.
    """
    last = index[:, -1:].clamp(max=0) if media_attention == "following" else index[:, -1:]
    num_following = max(0, end - max(start, index.shape[1]))
    return torch.cat([index[:, start:end], last.expand(-1, num_following)], dim=1)


def cross_attention_mask(
    index: torch.Tensor,
    numbers: torch.Tensor,
    num_latents: int,
    media_attention: str,
    before: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Expand image numbers into the mask of the cross-attention.

    Args:
        index: `(B, T)` from [`compute_image_index`].
        numbers: `(B, M)` from [`compute_image_numbers`].
        num_latents: `N`.
        media_attention: As in [`compute_image_index`].
        before: `(B, T)`, the images of the row before the document of each token; `None` where a row is one document.

    Returns:
        Bool `(B, 1, T, M*N)`, true where attended. A token that attends to nothing is true everywhere, which keeps
        its softmax finite; the block drops the result. So it is `None`, true everywhere, where there is one image.
    """
    if numbers.shape[1] == 1:
        return None
    index, numbers = index[:, :, None], numbers[:, None, :]  # (B, T, 1), (B, 1, M)
    if media_attention == "all_preceding":
        seen = (numbers > (0 if before is None else before[:, :, None])) & (numbers <= index)
    else:
        seen = (numbers > 0) & (numbers == index)
    seen = seen | ~seen.any(dim=-1, keepdim=True)  # (B, T, M)
    return seen.repeat_interleave(num_latents, dim=-1)[:, None]
