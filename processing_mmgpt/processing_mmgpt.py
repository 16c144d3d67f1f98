"""The processor: chat messages and images to ids and pixels. All strings and tokens are here."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature, GenerationConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .image_processing_mmgpt import MMGPTImageProcessor, image_format
from .messages_mmgpt import as_video, normalise, only_places, take_images
from .rendering_mmgpt import EncodedChat, RenderedChat, encode, render, variables


logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
PAD_TOKEN = "<PAD>"

# What `apply_chat_template` takes in `processor_kwargs` or beside it, with the defaults.
CHAT_OPTIONS = {
    "images": None,
    "padding": True,
    "padding_side": None,
    "pad_to_multiple_of": None,
    "truncation": False,
    "max_length": None,
    "add_special_tokens": False,
}


class MMGPTProcessor(ProcessorMixin):
    """Tokenizer, image processor and the one chat template.

    Args:
        image_processor: Turns pictures into pixels.
        tokenizer: A fast tokenizer that has `<image>` and `<|endofchunk|>` as special tokens, and an end token.
        chat_template: The template; by default the one in `chat_template_mmgpt.jinja`.

    Raises:
        ValueError: If the tokenizer is slow or lacks one of the tokens.

    No text of a message that [`encode_chat`] or [`apply_chat_template`] renders becomes a control token.
    `processor.tokenizer` renders the same template, but there `sanitize_control_tokens=True` has to be given.
    """

    def __init__(
        self,
        image_processor: MMGPTImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ):
        if chat_template is None:
            chat_template = Path(__file__).with_name("chat_template_mmgpt.jinja").read_text(encoding="utf-8")
        tokenizer = copy.copy(tokenizer)  # the caller's pads as before
        tokenizer.padding_side = "left"  # pipelines pad with the tokenizer; our own calls say which side they mean
        tokenizer.chat_template = chat_template  # as in a folder that is loaded, so it renders what we do
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        missing = {IMAGE_TOKEN, END_OF_CHUNK_TOKEN} - special
        if missing or not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer has to be a fast one with {IMAGE_TOKEN} and {END_OF_CHUNK_TOKEN} as special tokens; "
                f"is_fast is {tokenizer.is_fast}, missing are {sorted(missing)}. "
                "`MMGPTProcessor.from_vision_text_pretrained` adds them."
            )
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has no end token (`eos_token`), which ends each response and teaches `generate` to "
                "stop: set it, to the token that the language model ends with."
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
            vision_config: An open_clip model name or model config, for the size of the images.
            **kwargs: Arguments of [`MMGPTImageProcessor`], such as another `size`, mean and deviation; by default
                those of the tower, where a folder of transformers says them, and else CLIP's.
        """
        kwargs = {**image_format(vision, vision_config), **kwargs}
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
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """Turn control text and images into a batch.

        Args:
            text: One text or several; each `<image>` in them stands for an image.
            images: An image, a flat list that is divided by the `<image>`s of the texts, or a list for each text;
                `None` for none. A list of images or `{"type": "video", "video": file}` is a video.
            padding: As in a tokenizer.
            padding_side: `"left"` for generation, `"right"` for training.
            return_tensors: `"pt"`, `"np"`, or `None` for ids as lists.
            add_special_tokens: Let the tokenizer add its BOS, unless the text begins with it.
            truncation: Cut rows to `max_length` ids, at the tokenizer's `truncation_side`.
            max_length: The most ids of a row; by default the tokenizer's `model_max_length`.
            pad_to_multiple_of: Pad to a multiple of this number of ids.

        Returns:
            `input_ids` and `attention_mask` `(B, T)`; with images, `pixel_values` as [`MMGPTImageProcessor.stack`]
            makes them.

        Raises:
            TypeError: If `text` is not a string or a list of strings.
            ValueError: If a text has another number of `<image>`s than images, with the row and both numbers; or if
                truncation cuts one off.
        """
        if text is None:
            raise ValueError("The processor needs a text; pictures alone go to its `image_processor`.")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(row, str) for row in texts):
            raise TypeError(
                f"`text` is a string or a list of strings; got {_kinds(text)}. Name what is given: "
                "`processor(text=..., images=...)`."
            )
        bos = self.tokenizer.bos_token
        input_ids = [
            self.tokenizer(row, add_special_tokens=add_special_tokens and not (bos and row.startswith(bos)))[
                "input_ids"
            ]
            for row in texts
        ]
        images = [list(map(as_video, row)) for row in self._share_out(input_ids, images)]
        self._check_images(input_ids, images)
        padded = {"padding": padding, "padding_side": padding_side, "pad_to_multiple_of": pad_to_multiple_of}
        input_ids = self._truncated(input_ids, truncation, max_length, padding)
        return self.batch(input_ids, images, **padded, return_tensors=return_tensors, max_length=max_length)

    def encode_chat(
        self, messages: list[dict[str, Any]], images: list | None = None, **template_kwargs
    ) -> EncodedChat:
        """Render one conversation and tokenize it, with what is learnt.

        A control token typed in a message stays text: it gets the ids of its characters.

        Args:
            messages: The conversation.
            images: Images for the image parts without a source, in order.
            **template_kwargs: `chat_template`, `add_generation_prompt` and `continue_final_message` as in
                [`apply_chat_template`], and variables of the template.

        Raises:
            ValueError: On messages that [`~processing_mmgpt.messages_mmgpt.normalise`] refuses, if places and images
                differ in number, or if the template cannot render them.
        """
        messages, images = take_images(normalise(messages), images)
        return encode(self._render(messages, **template_kwargs), images, self.tokenizer)

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
        load_audio_from_video: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ) -> str | list[str] | BatchFeature | torch.Tensor:
        """Render conversations, and tokenize them if asked to.

        Args:
            conversation: Messages, or a list of such for a batch.
            chat_template: Another template.
            add_generation_prompt: End with the head of a response.
            return_assistant_tokens_mask: Return `assistant_masks` as well.
            tokenize: Return ids and pixels, not text.
            return_tensors: `"pt"`, as is `"auto"`, `"np"`, or `None` for lists.
            return_dict: Return the whole batch, not `input_ids` alone.
            continue_final_message: Leave the last message open.
            load_audio_from_video: Can only be false; the model takes no sound.
            processor_kwargs: `padding` as in a tokenizer, by default true; `padding_side`, by default `"left"` before
                generation and `"right"` else; `pad_to_multiple_of`, `truncation` and `max_length` as in [`__call__`];
                `images` for the image parts without a source, in order, for a batch a list each; `return_tensors`;
                `add_special_tokens`, which can only be false, for the template writes them.
            sanitize_control_tokens: Can only be true: control tokens in the messages are text.
            **kwargs: The `processor_kwargs` as well; and variables of the template.

        Raises:
            TypeError: On an unknown argument that the template does not read either.
            ValueError: As [`encode_chat`]; if truncation cuts an `<image>` off, or if two arguments contradict.
        """
        template = self.chat_template if chat_template is None else chat_template
        given = {key: kwargs.pop(key) for key in (*CHAT_OPTIONS, "return_tensors") if key in kwargs}
        given |= processor_kwargs or {}
        options = {**CHAT_OPTIONS, "return_tensors": return_tensors, **given}
        if unknown := given.keys() - {*CHAT_OPTIONS, "return_tensors"}:
            raise ValueError(
                f"apply_chat_template does not know the processor_kwargs {sorted(unknown)}; it knows "
                f"{[*CHAT_OPTIONS, 'return_tensors']}."
            )
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        if kwargs and (unread := kwargs.keys() - variables(template)):
            problem = (
                f"apply_chat_template does not take {sorted(unread)}, and the chat template reads no such variable."
            )
            if not unread <= GenerationConfig().to_dict().keys():
                raise TypeError(problem)
            # transformers' pipelines hand on what they are given: `pipe(..., do_sample=False)` comes here.
            logger.warning(f"{problem} Settings of `generate` go there, in a pipeline as `generate_kwargs`.")
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt begins a response, continue_final_message goes on: give one of them."
            )
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True.")
        if load_audio_from_video:
            raise ValueError("load_audio_from_video can only be false: the model hears nothing.")
        if options["add_special_tokens"] or not sanitize_control_tokens:
            raise ValueError(
                "The chat template writes the special tokens, and no text can: add_special_tokens can only be false, "
                "sanitize_control_tokens only true."
            )
        kwargs |= {"chat_template": template, "add_generation_prompt": add_generation_prompt}
        kwargs |= {"continue_final_message": continue_final_message}
        is_batch = bool(conversation) and isinstance(conversation, list | tuple)
        is_batch = is_batch and isinstance(conversation[0], list | tuple)
        conversations = conversation if is_batch else [conversation]
        if not tokenize:
            texts = [self._render(only_places(normalise(messages)), **kwargs).text for messages in conversations]
            return texts if is_batch else texts[0]
        images = options["images"] if is_batch else [options["images"]]
        chats = self._encode_chats(conversations, images or [None] * len(conversations), is_batch, kwargs)
        side = options["padding_side"] or ("left" if add_generation_prompt or continue_final_message else "right")
        tensors = "pt" if options["return_tensors"] == "auto" else options["return_tensors"]
        limits = options["truncation"], options["max_length"], options["padding"]
        batch = self.batch(
            self._truncated([chat.input_ids for chat in chats], *limits),
            [chat.images for chat in chats],
            options["padding"],
            side,
            tensors,
            pad_to_multiple_of=options["pad_to_multiple_of"],
            max_length=options["max_length"],
        )
        if return_assistant_tokens_mask:
            masks = self._truncated([chat.learnt for chat in chats], *limits)
            masks = pad_rows(masks, 0, side, max(map(len, batch["input_ids"]))) if options["padding"] else masks
            batch["assistant_masks"] = as_tensors(masks, tensors)
        return batch if return_dict else batch["input_ids"]

    def continue_chat(
        self,
        sequences: torch.LongTensor,
        attention_mask: torch.LongTensor,
        conversations: list[list[dict[str, Any]]],
        images: list[list] | None = None,
    ) -> BatchFeature:
        """Append a new turn to what `generate` returned, for a `generate` that continues from its cache.

        The old ids are kept: rendered again, they might differ from those in the cache.

        Args:
            sequences: `(B, T)`, the ids of prompt and reply.
            attention_mask: `(B, T_prompt)`, the mask of the prompt.
            conversations: For each row, the messages of the new turn alone.
            images: For each row, images for its image parts without a source, in order.

        Returns:
            `input_ids` and `attention_mask` `(B, T + T_new)`, and the `pixel_values` of the new images.
        """
        images = [None] * len(conversations) if images is None else images
        end = self.tokenizer.eos_token_id
        reply = sequences[:, attention_mask.shape[1] :]
        is_end = (reply == end).cumsum(dim=1)  # (B, T_reply)
        reply_mask = (is_end - (reply == end).long() == 0).long()  # up to the end token, without the padding behind
        rows, new_images = [], []
        for ended, messages, given in zip(is_end[:, -1].tolist(), conversations, images, strict=True):
            # Behind an exchange, so that it is written as a turn that follows one, whatever the template.
            before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            turn = self.encode_chat([*before, *messages], given, add_generation_prompt=True)
            ids = turn.input_ids[turn.ends[0] :]
            rows.append(ids if ended else [end, *ids])
            new_images.append(turn.images)
        batch = self.batch(rows, new_images, padding=True, padding_side="left")
        masks = attention_mask, reply_mask.to(attention_mask), batch["attention_mask"].to(attention_mask)
        batch["input_ids"] = torch.cat([sequences, batch["input_ids"].to(sequences)], dim=1)
        batch["attention_mask"] = torch.cat(masks, dim=1)
        return batch

    def batch(
        self,
        input_ids: list[list[int]],
        images: list[list],
        padding: bool | str,
        padding_side: str,
        return_tensors: str | None = "pt",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """Pad rows of ids and stack their images; the arguments are those of [`__call__`].

        Raises:
            ValueError: If a row has another number of `<image>`s than images, with the row and both numbers.
        """
        self._check_images(input_ids, images)
        padded = self.tokenizer.pad(
            {"input_ids": input_ids},
            padding=padding,
            padding_side=padding_side,
            max_length=max_length if padding == "max_length" else None,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )
        pictures = self.image_processor.stack(images)
        if return_tensors == "np":
            pictures = {key: value.numpy() for key, value in pictures.items()}
        return BatchFeature({**padded, **pictures})

    def _check_images(self, input_ids: list[list[int]], images: list[list]) -> None:
        for number, (ids, own) in enumerate(zip(input_ids, images, strict=True)):
            if ids.count(self.image_token_id) != len(own):
                raise ValueError(
                    f"Row {number} holds {ids.count(self.image_token_id)} {IMAGE_TOKEN} tokens, but {len(own)} "
                    "pictures were given for it. Give one picture for each token."
                )

    def _truncated(
        self,
        rows: list[list[int]],
        truncation: bool | str | None,
        max_length: int | None,
        padding: bool | str,
    ) -> list[list[int]]:
        """Cut rows of ids to `max_length`; a tokenizer would store the length for all threads.

        Raises:
            ValueError: If an `<image>` is cut off, or `max_length` is given without truncation or padding to it.
        """
        if truncation in (None, False, "do_not_truncate"):
            if max_length is not None and padding != "max_length":
                raise ValueError(
                    f"max_length is {max_length}, and there is neither truncation=True nor padding='max_length' to "
                    "use it."
                )
            return rows
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        kept = [row[-limit:] if self.tokenizer.truncation_side == "left" else row[:limit] for row in rows]
        for number, (row, ids) in enumerate(zip(rows, kept, strict=True)):
            if lost := row.count(self.image_token_id) - ids.count(self.image_token_id):
                raise ValueError(
                    f"Row {number}: truncation to {limit} of its {len(row)} ids cuts {lost} {IMAGE_TOKEN} off: raise "
                    "max_length, or leave the picture out. `MMGPTCollator` cuts conversations between turns, with "
                    "their pictures."
                )
        return kept

    def _render(self, messages: list[dict], chat_template: str | None = None, **template_kwargs) -> RenderedChat:
        template = self.chat_template if chat_template is None else chat_template
        return render(messages, self.tokenizer, template, **template_kwargs)

    def _encode_chats(self, conversations: list, images: list, is_batch: bool, options: dict) -> list[EncodedChat]:
        chats = []
        for number, (messages, given) in enumerate(zip(conversations, images, strict=True)):
            try:
                chats.append(self.encode_chat(messages, given, **options))
            except ValueError as error:
                raise ValueError(f"Row {number}: {error}" if is_batch else str(error)) from error
        return chats

    def _share_out(self, input_ids: list[list[int]], images: Any) -> list[list]:
        """Divide `images` into one list for each row."""
        if images is None:
            return [[] for _ in input_ids]
        if not isinstance(images, list | tuple):
            images = [images]
        rows = [[] if row is None else row for row in images]
        if len(rows) == len(input_ids) and all(isinstance(row, list | tuple) for row in rows):
            return rows
        counts = [ids.count(self.image_token_id) for ids in input_ids]
        if sum(counts) != len(images):
            raise ValueError(
                f"The texts hold {counts} {IMAGE_TOKEN} tokens, row by row, but {len(images)} pictures were given in "
                "one list. Give one picture for each token, or a list for each row."
            )
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in counts]


def add_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer `<|endofchunk|>`, `<image>` and, if it has no padding token, `<PAD>`, in place.

    Its own special tokens stay.
    """
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [END_OF_CHUNK_TOKEN, IMAGE_TOKEN]}, replace_extra_special_tokens=False
    )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def as_tensors(rows: list[list[int]], kind: str | None) -> torch.Tensor | np.ndarray | list[list[int]]:
    """Make rows of integers a `"pt"` tensor or `"np"` array, or leave them lists."""
    if kind is None:
        return rows
    return torch.tensor(rows) if kind == "pt" else np.array(rows)


def pad_rows(rows: list[list[int]], value: int, side: str, width: int) -> list[list[int]]:
    """Pad rows of integers to `width` on one side."""
    if side == "left":
        return [[value] * (width - len(row)) + row for row in rows]
    return [row + [value] * (width - len(row)) for row in rows]


def _kinds(given: Any) -> str:
    """Name the type of a value, and the types inside a list."""
    if not isinstance(given, list | tuple):
        return f"a {type(given).__name__}"
    return f"a {type(given).__name__} of {', '.join(sorted({type(one).__name__ for one in given}))}"
