"""The processor: chat messages and pictures to ids and pixels. It owns every string and every token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .image_processing_mmgpt import MMGPTImageProcessor
from .messages_mmgpt import fill_images, hide_control_tokens, normalise, split_hidden


IMAGE_TOKEN = "<image>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"


class MMGPTProcessor(ProcessorMixin):
    """Tokenizer, image processor and the one chat template.

    Args:
        image_processor: Turns pictures into pixels.
        tokenizer: A fast tokenizer that has `<image>` and `<|endofchunk|>` as special tokens.
        chat_template: The template; by default the one in `chat_template_mmgpt.jinja`.

    Raises:
        ValueError: If the tokenizer is slow or lacks one of the tokens.
    """

    def __init__(
        self,
        image_processor: MMGPTImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ):
        if chat_template is None:
            chat_template = Path(__file__).with_name("chat_template_mmgpt.jinja").read_text(encoding="utf-8")
        tokenizer.padding_side = "left"  # pipelines pad with the tokenizer; our own calls say which side they mean
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        missing = {IMAGE_TOKEN, END_OF_CHUNK_TOKEN} - set(tokenizer.all_special_tokens)
        if missing or not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer has to be a fast one with {IMAGE_TOKEN} and {END_OF_CHUNK_TOKEN} as special tokens; "
                f"is_fast is {tokenizer.is_fast}, missing are {sorted(missing)}. "
                "`MMGPTProcessor.from_vision_text_pretrained` adds them."
            )
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.end_of_chunk_token_id = tokenizer.convert_tokens_to_ids(END_OF_CHUNK_TOKEN)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: Any, text: str, *, vision_config: str | dict | None = None, **kwargs
    ) -> "MMGPTProcessor":
        """Make the processor for the tower and the LM that the model of the same method joins.

        The tokenizer gets `<|endofchunk|>`, `<image>` and, if it has no padding token, `<PAD>`, in this order.

        Args:
            vision: As for the model; read only without `vision_config`, as the folder or id of a vision model.
            text: Folder or Hub id of the LM, for its tokenizer.
            vision_config: An open_clip model name or model config, for the size of the pictures.
            **kwargs: Arguments of [`MMGPTImageProcessor`], such as another `size`, mean and deviation; by default
                those of the tower, where a folder of transformers says them, and else CLIP's.
        """
        kwargs = {**_picture_format(vision, vision_config), **kwargs}
        tokenizer = AutoTokenizer.from_pretrained(text)
        add_control_tokens(tokenizer)
        return cls(MMGPTImageProcessor(**kwargs), tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """The keys of a batch."""
        return ["input_ids", "attention_mask", "pixel_values", "num_frames"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        padding: bool | str = False,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        **kwargs,
    ) -> BatchFeature:
        """Turn control text and pictures into a batch.

        Args:
            text: One text or several; each `<image>` in them stands for a picture.
            images: A picture, a flat list that the texts share out by their `<image>`s, or a list for each text. In
                place of a picture, a list of pictures or `{"type": "video", "video": file}` is a video.
            padding: As in a tokenizer.
            padding_side: `"left"` for generation, `"right"` for training.
            return_tensors: `"pt"`, or `None` for ids as lists.
            add_special_tokens: Let the tokenizer add its BOS, unless the text begins with it.
            **kwargs: Handed to the tokenizer.

        Returns:
            `input_ids` and `attention_mask` `(B, T)`; with images, `pixel_values` as [`stack_pictures`] makes them.

        Raises:
            ValueError: If a text has another number of `<image>`s than pictures, with the row and both numbers.
        """
        if text is None:
            raise ValueError("The processor needs a text; pictures alone go to its `image_processor`.")
        texts = [text] if isinstance(text, str) else list(text)
        bos = self.tokenizer.bos_token
        input_ids = [
            self.tokenizer(row, add_special_tokens=add_special_tokens and not (bos and row.startswith(bos)), **kwargs)[
                "input_ids"
            ]
            for row in texts
        ]
        pictures = self._share_out(input_ids, images)
        max_length = kwargs.get("max_length")
        return self.batch(input_ids, pictures, padding, padding_side, return_tensors, max_length=max_length)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        images: list | None = None,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **template_kwargs,
    ) -> dict[str, list]:
        """Render one conversation and tokenize it, with what is trained on.

        A control token that stands literally in a message stays text: it gets the ids of its characters.

        Args:
            messages: The conversation.
            images: Pictures for the image parts without a source, in order.
            add_generation_prompt: End with the head of a response.
            chat_template: Another template.
            continue_final_message: Leave the last message open.
            **template_kwargs: Variables of the template.

        Returns:
            `input_ids`; `assistant_masks`, 1 at the tokens of responses and their end tokens; `images`, the pictures.

        Raises:
            ValueError: On messages that [`~processing_mmgpt.messages_mmgpt.normalise`] refuses, if places and pictures
                differ in number, or if the template cannot render them.
        """
        messages = normalise(messages)
        pictures = fill_images(messages, images)
        rendered, spans = self._render(
            messages, add_generation_prompt, chat_template, continue_final_message, template_kwargs
        )
        ids, mask, offset = [], [], 0
        for piece, length, stays_text in split_hidden(rendered, self._control_tokens):
            encoded = self.tokenizer(
                piece, add_special_tokens=False, split_special_tokens=stays_text, return_offsets_mapping=True
            )
            for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                at = offset if stays_text else offset + start
                ids.append(token)
                mask.append(int(any(begin <= at < end for begin, end in spans)))
            offset += length
        return {"input_ids": ids, "assistant_masks": mask, "images": pictures}

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        return_dict: bool = False,
        continue_final_message: bool = False,
        processor_kwargs: dict | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        images: list | None = None,
        **template_kwargs,
    ) -> str | list[str] | BatchFeature | torch.Tensor:
        """Render conversations, and tokenize them if asked to.

        Args:
            conversation: Messages, or a list of such for a batch.
            chat_template: Another template.
            add_generation_prompt: End with the head of a response.
            return_assistant_tokens_mask: Return `assistant_masks` as well.
            tokenize: Return ids and pixels, not text.
            return_tensors: `"pt"`, or `None` for ids as lists.
            return_dict: Return the whole batch, not `input_ids` alone.
            continue_final_message: Leave the last message open.
            processor_kwargs: `padding`, `padding_side` and `images` may stand in here, where transformers puts them.
            padding: As in a tokenizer.
            padding_side: By default `"left"` before generation and `"right"` else.
            images: Pictures for the image parts without a source, in order; for a batch, a list each.
            **template_kwargs: Variables of the template.

        Raises:
            ValueError: As [`encode_chat`].
        """
        processor_kwargs = dict(processor_kwargs or {})
        padding = processor_kwargs.pop("padding", padding)
        images = processor_kwargs.pop("images", images)
        side = processor_kwargs.pop("padding_side", padding_side) or ("left" if add_generation_prompt else "right")
        return_tensors = "pt" if return_tensors == "auto" else processor_kwargs.pop("return_tensors", return_tensors)
        if processor_kwargs:
            raise ValueError(f"apply_chat_template does not know the processor_kwargs {sorted(processor_kwargs)}.")
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        conversations = conversation if is_batch else [conversation]
        options = (add_generation_prompt, chat_template, continue_final_message)
        if not tokenize:
            texts = [self._render(normalise(messages), *options, template_kwargs)[0] for messages in conversations]
            texts = ["".join(piece for piece, *_ in split_hidden(text, self._control_tokens)) for text in texts]
            return texts if is_batch else texts[0]
        pictures = images if is_batch and images is not None else [images] * len(conversations)
        rows = []
        for number, (messages, given) in enumerate(zip(conversations, pictures, strict=True)):
            try:
                rows.append(self.encode_chat(messages, given, *options, **template_kwargs))
            except ValueError as error:
                raise ValueError(f"Row {number}: {error}" if is_batch else str(error)) from error
        batch = self.batch(
            [row["input_ids"] for row in rows], [row["images"] for row in rows], padding, side, return_tensors
        )
        if return_assistant_tokens_mask:
            masks = [row["assistant_masks"] for row in rows]
            width = max(map(len, batch["input_ids"]))
            batch["assistant_masks"] = pad_rows(masks, 0, side, width) if padding else masks
            if return_tensors == "pt":
                batch["assistant_masks"] = torch.tensor(batch["assistant_masks"])
        return batch if return_dict else batch["input_ids"]

    def continue_chat(
        self,
        sequences: torch.LongTensor,
        attention_mask: torch.LongTensor,
        conversations: list[list[dict[str, Any]]],
        images: list[list] | None = None,
    ) -> BatchFeature:
        """Put a new turn behind what `generate` returned, for a `generate` that goes on from its cache.

        The old ids are taken as they are: rendered anew, they might differ from those in the cache.

        Args:
            sequences: `(B, T)`, the ids of prompt and reply.
            attention_mask: `(B, T_prompt)`, the mask of the prompt.
            conversations: For each row, the messages of the new turn alone.
            images: For each row, pictures for its image parts without a source, in order.

        Returns:
            `input_ids` and `attention_mask` `(B, T + T_new)`, and the `pixel_values` of the new pictures.
        """
        images = [None] * len(conversations) if images is None else images
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        reply = sequences[:, attention_mask.shape[1] :]
        is_end = (reply == end).cumsum(dim=1)  # (B, T_reply)
        reply_mask = (is_end - (reply == end).long() == 0).long()  # up to the end token, without the padding behind
        rows, pictures = [], []
        for ended, messages, given in zip(is_end[:, -1].tolist(), conversations, images, strict=True):
            # An empty system message leaves out the preamble.
            turn = self.encode_chat([{"role": "system", "content": ""}, *messages], given, add_generation_prompt=True)
            ids = turn["input_ids"][1 if self.tokenizer.bos_token else 0 :]
            rows.append(ids if ended else [end, *ids])
            pictures.append(turn["images"])
        width = max(map(len, rows))
        new_ids = sequences.new_tensor(pad_rows(rows, pad, "left", width))
        new_mask = attention_mask.new_tensor(pad_rows([[1] * len(row) for row in rows], 0, "left", width))
        return BatchFeature(
            {
                "input_ids": torch.cat([sequences, new_ids], dim=1),
                "attention_mask": torch.cat([attention_mask, reply_mask.to(attention_mask), new_mask], dim=1),
                **self.stack_pictures(pictures),
            }
        )

    def batch(
        self,
        input_ids: list[list[int]],
        images: list[list],
        padding: bool | str,
        padding_side: str,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Pad rows of ids and stack their pictures.

        Raises:
            ValueError: If a row has another number of `<image>`s than pictures, with the row and both numbers.
        """
        for row, (ids, pictures) in enumerate(zip(input_ids, images, strict=True)):
            if ids.count(self.image_token_id) != len(pictures):
                raise ValueError(
                    f"Row {row} holds {ids.count(self.image_token_id)} {IMAGE_TOKEN} tokens, but {len(pictures)} "
                    "pictures were given for it. Give one picture for each token."
                )
        batch = self.tokenizer.pad(
            {"input_ids": input_ids},
            padding=padding,
            padding_side=padding_side,
            return_tensors=return_tensors,
            **kwargs,
        )
        return BatchFeature({**batch, **self.stack_pictures(images)})

    def stack_pictures(self, images: list[list]) -> dict[str, torch.Tensor]:
        """Stack the pictures of each row, zeros where a row has fewer.

        Args:
            images: For each row its pictures and videos, in the forms of [`MMGPTImageProcessor.frames`]; or for all
                rows `{"type": "latents", "latents": (N, D_vision)}`, what the model made of a picture before.

        Returns:
            Nothing if no row has a picture; else `pixel_values` `(B, M, 3, size, size)`, or with a video
            `(B, M, F, 3, size, size)` and `num_frames` `(B, M)`; of latents, `image_latents` `(B, M, N, D_vision)`.
        """
        num_images = max(map(len, images), default=0)
        if num_images == 0:
            return {}
        if any(isinstance(picture, dict) and picture.get("type") == "latents" for row in images for picture in row):
            return {"image_latents": stack_latents(images)}
        is_video = any(isinstance(picture, list | tuple | dict) for row in images for picture in row)
        frames: list[list[torch.Tensor]] = []  # each (F, 3, size, size)
        for row, pictures in enumerate(images):
            try:
                frames.append([self.image_processor.frames(picture) for picture in pictures])
            except ValueError as error:
                raise ValueError(f"Row {row}: {error}") from error
        num_frames = torch.tensor([[len(p) for p in row] + [1] * (num_images - len(row)) for row in frames])  # (B, M)
        size = self.image_processor.size
        pixel_values = torch.zeros(len(images), num_images, int(num_frames.max()), 3, size, size)
        for row, pictures in enumerate(frames):
            for column, pixels in enumerate(pictures):
                pixel_values[row, column, : len(pixels)] = pixels
        if is_video:
            return {"pixel_values": pixel_values, "num_frames": num_frames}
        return {"pixel_values": pixel_values[:, :, 0]}

    @property
    def _control_tokens(self) -> list[str]:
        return self.tokenizer.all_special_tokens

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        chat_template: str | None,
        continue_final_message: bool,
        template_kwargs: dict,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render normalised messages, control tokens in their texts hidden; the spans are those of responses."""
        try:
            rendered, spans = render_jinja_template(
                conversations=[hide_control_tokens(messages, self._control_tokens)],
                chat_template=self.chat_template if chat_template is None else chat_template,
                return_assistant_tokens_mask=True,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens_map, **template_kwargs},
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"The chat template cannot render these messages: {error}") from error
        return rendered[0], spans[0]

    def _share_out(self, input_ids: list[list[int]], images: Any) -> list[list]:
        """Bring `images` into one list for each row."""
        if images is None:
            return [[] for _ in input_ids]
        if not isinstance(images, list | tuple):
            images = [images]
        if len(images) == len(input_ids) and all(isinstance(row, list | tuple) for row in images):
            return [list(row) for row in images]
        counts = [ids.count(self.image_token_id) for ids in input_ids]
        if sum(counts) != len(images):
            raise ValueError(
                f"The texts hold {counts} {IMAGE_TOKEN} tokens, row by row, but {len(images)} pictures were given in "
                "one list. Give one picture for each token, or a list for each row."
            )
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in counts]


def add_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer `<|endofchunk|>`, `<image>` and, if it has no padding token, `<PAD>`, in place."""
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK_TOKEN, IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def pad_rows(rows: list[list[int]], value: int, side: str, width: int) -> list[list[int]]:
    """Pad rows of integers to `width` on one side."""
    if side == "left":
        return [[value] * (width - len(row)) + row for row in rows]
    return [row + [value] * (width - len(row)) for row in rows]


def stack_latents(images: list[list[dict[str, Any]]]) -> torch.Tensor:
    """Stack the latents of each row `(B, M, N, D_vision)`, zeros where a row has fewer; one row at least has some.

    Raises:
        ValueError: If there are pictures among them: a batch has latents or pixels.
    """
    if not all(isinstance(picture, dict) and "latents" in picture for row in images for picture in row):
        raise ValueError("Some pictures of the batch are latents and some are not: give either for all.")
    latents = [[picture["latents"] for picture in row] for row in images]  # each (N, D_vision)
    first = next(one for row in latents for one in row)
    stacked = first.new_zeros(len(images), max(map(len, images)), *first.shape)
    for row, own in enumerate(latents):
        for column, one in enumerate(own):
            stacked[row, column] = one
    return stacked


def _picture_format(vision: Any, vision_config: str | dict | None) -> dict[str, Any]:
    """Size, and where it is known mean and deviation, of the pictures that a tower was trained on."""
    if vision_config is None:
        full = AutoConfig.from_pretrained(vision)
        size = {"size": getattr(full, "vision_config", full).image_size}
        try:
            own, _ = BaseImageProcessor.get_image_processor_dict(vision)
        except OSError:  # a tower saved without an image processor
            return size
        return {**size, "image_mean": own["image_mean"], "image_std": own["image_std"]}
    if isinstance(vision_config, str):
        try:
            import open_clip
        except ImportError as error:
            raise ImportError("Reading an open_clip model name needs `pip install open_clip_torch`.") from error
        vision_config = open_clip.get_model_config(vision_config)
    return {"size": vision_config.get("vision_cfg", vision_config)["image_size"]}
