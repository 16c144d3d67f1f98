"""Rendering: messages through the chat template to text, and to ids of which some are learnt."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template


# Where a control token stands literally in somebody's text, rendering carries this private character and one more that
# numbers the token: neither the template nor the tokenizer can take them for control.
HIDDEN = "\U000f0000"


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens.

    Args:
        input_ids: The ids.
        learnt: For each id 1 if it is of a response or its end token, which are learnt, else 0.
        images: What stands at each `<image>`, see [`~processing_mmgpt.messages_mmgpt.take_images`].
        ends: For each response, how many ids there are up to its end.
    """

    input_ids: list[int]
    learnt: list[int]
    images: list
    ends: list[int]

    def cut(self, max_length: int, image_token_id: int) -> "EncodedChat":
        """Cut what has more than `max_length` ids behind the last response that fits whole; to nothing if none does.

        Exactly the images whose token is cut off go.
        """
        if len(self.input_ids) <= max_length:
            return self
        ends = [end for end in self.ends if end <= max_length]
        length = ends[-1] if ends else 0
        num_images = len(self.images) - self.input_ids[length:].count(image_token_id)
        return EncodedChat(self.input_ids[:length], self.learnt[:length], self.images[:num_images], ends)


def render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, chat_template: str, **template_kwargs
) -> tuple[str, list[tuple[int, int]]]:
    """Render normalised messages, control tokens in their texts hidden.

    Args:
        messages: Messages from [`~processing_mmgpt.messages_mmgpt.normalise`].
        tokenizer: Says what the control tokens are.
        chat_template: The template.
        **template_kwargs: Its variables, `add_generation_prompt` and `continue_final_message`.

    Returns:
        The text, for [`split_hidden`], and where in it each response begins and ends.

    Raises:
        ValueError: If the template cannot render them.
    """
    try:
        rendered, spans = render_jinja_template(
            conversations=[_hide(messages, tokenizer.all_special_tokens)],
            chat_template=chat_template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **template_kwargs},
        )
    except Exception as error:  # a template is a program
        raise ValueError(f"The chat template cannot render these messages: {error}") from error
    return rendered[0], spans[0]


def encode(
    rendered: str, spans: list[tuple[int, int]], images: list, tokenizer: PreTrainedTokenizerBase
) -> EncodedChat:
    """Tokenize what [`render`] returned. A control token that is hidden in it gets the ids of its characters."""
    ids, starts, offset = [], [], 0  # where in the text each token begins
    for piece, length, stays_text in split_hidden(rendered, tokenizer.all_special_tokens):
        encoded = tokenizer(
            piece, add_special_tokens=False, split_special_tokens=stays_text, return_offsets_mapping=True
        )
        ids += encoded["input_ids"]
        starts += [offset + (0 if stays_text else start) for start, _ in encoded["offset_mapping"]]
        offset += length
    learnt = [int(any(begin <= start < end for begin, end in spans)) for start in starts]
    ends = [sum(start < end for start in starts) for _, end in spans]
    return EncodedChat(ids, learnt, images, ends)


def _hide(messages: list[dict[str, Any]], tokens: list[str]) -> list[dict[str, Any]]:
    """Replace each control token that stands literally in a text by two private characters."""
    hidden = [HIDDEN, *tokens]
    pattern = re.compile("|".join(re.escape(token) for token in sorted(hidden, key=len, reverse=True)))

    def hide(text: str) -> str:
        return pattern.sub(lambda match: HIDDEN + chr(ord(HIDDEN) + hidden.index(match.group())), text)

    return [
        {
            **message,
            "content": [
                {**part, "text": hide(part["text"])} if "text" in part else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def split_hidden(rendered: str, tokens: list[str]) -> Iterator[tuple[str, int, bool]]:
    """Split a rendered text into pieces.

    Yields:
        Each piece as it is meant, its length in `rendered`, and whether it is a control token that has to stay text.

    Raises:
        ValueError: If what follows a private character is not what was put there.
    """
    hidden = [HIDDEN, *tokens]
    for number, piece in enumerate(re.split(f"{HIDDEN}(.)", rendered, flags=re.DOTALL)):
        if number % 2:
            token = ord(piece) - ord(HIDDEN)
            if not 0 <= token < len(hidden):
                raise ValueError("The chat template takes texts apart, or holds a private character of ours: U+F0000.")
            yield hidden[token], 2, True
        elif piece:
            yield piece, len(piece), False
