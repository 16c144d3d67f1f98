r"""The tokenizer of the tiny world: one id a word, the same in every place of a line.

A Unigram model with equal scores takes the fewest pieces. Each word of the world is a piece with its leading space,
written "▁", and a line starts with such a space too, so "\nred" and " red" end in the same id. Digits and characters
are never merged. Other words are split into characters, and beyond ASCII into bytes.
"""

import re
import string
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

import processing_mmgpt

from . import corpus, language, questions, scenes


PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPACE = "▁"


def _template() -> str:
    """What the chat template writes around the messages."""
    blank = [{"type": "text", "text": ""}, {"type": "input", "text": ""}]
    messages = [{"role": "user", "content": [{"type": "image"}, *blank]}, {"role": "assistant", "content": blank[:1]}]
    path = Path(processing_mmgpt.__file__).with_name("chat_template_mmgpt.jinja")
    (rendered,), _ = render_jinja_template([messages], chat_template=path.read_text(encoding="utf-8"), eos_token="")
    return rendered.replace("<image>", "")


def _phrases() -> Iterator[str]:
    """All that the generators write, with the fields of format strings left open."""
    yield _template()
    for wordings in (questions.WORDINGS, language.WORDINGS, corpus.KEYS, corpus.TEXT_KEYS):
        for phrases in wordings.values():
            yield from phrases
    yield from (*corpus.CAPTIONS.values(), scenes.DESCRIPTION, corpus.IN_ORDER, corpus.LABELLED, corpus.STATEMENT)
    for names in (scenes.COLOURS, scenes.SHAPES, scenes.SIZES, scenes.CELLS, language.CATEGORY, language.NOUNS):
        yield from names
    yield from (*corpus.PSEUDO_WORDS, "a", "an", "yes", "no")


def _words() -> list[str]:
    text = re.sub(r"\{.*?\}", " ", " ".join(_phrases()))
    return sorted({word for word in re.findall(r"[A-Za-z]+(?:-[a-z]+)?", text) if len(word) > 1})


def _pieces() -> list[str]:
    """The vocabulary, in the order of the ids."""
    characters = string.ascii_letters + string.digits + string.punctuation
    return [
        *(PAD, BOS, EOS, UNKNOWN),
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(SPACE, "\n", f"{SPACE}\n", f"{SPACE}\n\n", f"{SPACE}###"),
        *characters,
        *(SPACE + character for character in characters),
        *(SPACE + word for word in _words()),
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, without `<image>` and `<|endofchunk|>`, which the processor adds.

    Any text is restored from its ids, except for white space next to line breaks.
    """
    pieces = _pieces()
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=pieces.index(UNKNOWN), byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="always"),
            pre_tokenizers.Split("<", "isolated"),  # "<0x41>" in a text is no byte
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Replace(SPACE, " "),
            decoders.Fuse(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )
