"""Render messages through the chat template to text, and to ids with a mark of those that are learnt."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


# Rendering carries this private character and one more, which numbers what is meant: where a response begins and ends,
# and a control token that stands literally in somebody's text. Neither template nor tokenizer takes them for control.
HIDDEN = "\U000f0000"
BEGIN, END = "\U000f0001", "\U000f0002"
FIRST = ord(END) + 1  # of the numbers of literals

GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens.

    Args:
        input_ids: The ids.
        learnt: For each id 1 if it belongs to a response or its end token, which are learnt, else 0.
        images: What stands at each `<image>`, see [`~processing_mmgpt.messages_mmgpt.take_images`].
        ends: For each response, the number of ids up to its end.
    """

    input_ids: list[int]
    learnt: list[int]
    images: list
    ends: list[int]

    def cut(self, max_length: int, image_token_id: int) -> "EncodedChat":
        """Cut a conversation of more than `max_length` ids after the last response that fits; to nothing if none fits.

        Exactly the images whose tokens are cut off are removed.
        """
        if len(self.input_ids) <= max_length:
            return self
        ends = [end for end in self.ends if end <= max_length]
        length = ends[-1] if ends else 0
        num_images = len(self.images) - self.input_ids[length:].count(image_token_id)
        return EncodedChat(self.input_ids[:length], self.learnt[:length], self.images[:num_images], ends)


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Args:
        pieces: Pieces of the text, and for each whether it is a control token that has to stay text.
        spans: Where in the text each response begins and ends.
    """

    pieces: list[tuple[str, bool]]
    spans: list[tuple[int, int]]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece for piece, _ in self.pieces)


def control_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> list[str]:
    """The tokens that text must not become: all special ones, and the added ones that the template writes."""
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special or str(t) in chat_template]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, chat_template: str, **template_kwargs
) -> RenderedChat:
    """Render normalised messages.

    Args:
        messages: Messages from [`~processing_mmgpt.messages_mmgpt.normalise`].
        tokenizer: Says what the control tokens are.
        chat_template: The template.
        **template_kwargs: Its variables, `add_generation_prompt` and `continue_final_message`.

    Raises:
        ValueError: If the template cannot render them.
    """
    literals = [HIDDEN, *control_tokens(tokenizer, chat_template)]
    try:
        rendered = tokenizer.apply_chat_template(
            _hide(messages, literals),
            chat_template=GENERATION.sub(_mark, chat_template),
            tokenize=False,
            **template_kwargs,
        )
    except Exception as error:  # a template is a program
        raise ValueError(f"The chat template cannot render these messages: {error}") from error
    return _split(rendered, literals)


def variables(chat_template: str) -> set[str]:
    """The variables that a chat template reads.

    Raises:
        ValueError: If it is not a template.
    """
    from jinja2 import Environment, TemplateError, meta

    plain = GENERATION.sub("", chat_template)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateError as error:
        raise ValueError(f"The chat template cannot be read: {error}") from error
    return meta.find_undeclared_variables(tree)


def _mark(tag: re.Match) -> str:
    """Mark where a response begins before the opening tag, and where it ends after the closing one.

    The tags remove the same white space around them as without the marks.
    """
    before, is_end, after = tag.groups()
    if is_end:
        return f"{{%{before} endgeneration %}}{{% if true %}}{HIDDEN}{END}{{% endif {after}%}}"
    return f"{{%{before} if true %}}{HIDDEN}{BEGIN}{{% endif %}}{{% generation {after}%}}"


def _hide(messages: list[dict[str, Any]], literals: list[str]) -> list[dict[str, Any]]:
    """Replace each of the literals in a text by two private characters."""
    pattern = re.compile("|".join(re.escape(token) for token in sorted(literals, key=len, reverse=True)))
    codes = {token: HIDDEN + chr(FIRST + number) for number, token in enumerate(literals)}

    def hide(text: str) -> str:
        return pattern.sub(lambda match: codes[match.group()], text)

    return [
        {
            **message,
            "content": [
                {**part, "text": hide(part["text"])} if "text" in part else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def _split(rendered: str, literals: list[str]) -> RenderedChat:
    """Split what a template wrote at the private characters.

    Raises:
        ValueError: If a private character is not followed by what was put there.
    """
    pieces, spans, length, begin = [], [], 0, None
    for number, piece in enumerate(re.split(f"{HIDDEN}(.?)", rendered, flags=re.DOTALL)):
        is_literal = number % 2 == 1
        if is_literal and piece == BEGIN:
            begin = length
            continue
        if is_literal and piece == END and begin is not None:
            spans.append((begin, length))
            begin = None
            continue
        if is_literal:
            code = ord(piece) - FIRST if piece else -1
            if not 0 <= code < len(literals):
                raise ValueError("The chat template takes texts apart, or holds a private character of ours: U+F0000.")
            piece = literals[code]
        if is_literal or not pieces or pieces[-1][1]:
            pieces.append(([], is_literal))
        pieces[-1][0].append(piece)  # what is parted by a response alone is tokenized as one
        length += len(piece)
    if begin is not None:  # the last response is left open
        spans.append((begin, length))
    return RenderedChat([("".join(parts), is_literal) for parts, is_literal in pieces], spans)


def encode(chat: RenderedChat, images: list, tokenizer: PreTrainedTokenizerBase) -> EncodedChat:
    """Tokenize a rendered conversation. A control token that has to stay text gets the ids of its characters."""
    tokens = list(_tokens(chat, tokenizer))
    learnt, ends, spans = [0] * len(tokens), [], iter(chat.spans)
    begin, end = next(spans, (None, None))
    for number, (_, start) in enumerate(tokens):
        while end is not None and start >= end:
            ends.append(number)
            begin, end = next(spans, (None, None))
        learnt[number] = int(end is not None and start >= begin)
    if end is not None:
        ends.append(len(tokens))
    ends += [len(tokens) for _ in spans]
    return EncodedChat([token for token, _ in tokens], learnt, images, ends)


def _tokens(chat: RenderedChat, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Each token and where in the text it begins."""
    offset = 0
    literals = {piece: _as_text(piece, tokenizer) for piece in {p for p, stays_text in chat.pieces if stays_text}}
    texts = list(dict.fromkeys(piece for piece, stays_text in chat.pieces if not stays_text))
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True
    )  # one call: each costs as 20 words
    rows = dict(zip(texts, zip(encoded["input_ids"], encoded["offset_mapping"], strict=True), strict=True))
    for piece, stays_text in chat.pieces:
        if stays_text:
            yield from ((token, offset) for token in literals[piece])
        else:
            yield from ((token, offset + start) for token, (start, _) in zip(*rows[piece], strict=True))
        offset += len(piece)


def _as_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text in which added tokens stay text.

    The tokenizer's own switch, `split_special_tokens`, is shared by all threads, and covers special tokens only.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]
