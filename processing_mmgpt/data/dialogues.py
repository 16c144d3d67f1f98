"""Readers of dialogues and of text alone; see `readers`."""

import random
import re

from .records import Record, dialogue, exchange, field, path_field


# Dialogues with a picture: a list of turns


def read_llava(record: Record, rng: random.Random) -> Record:
    r"""Read the first exchange of a LLaVA record (`detail_23k.json`, `complex_reasoning_77k.json`).

    `{"id": "1", "image": "000000442786.jpg", "conversations": [{"from": "human", "value": "<image>\nWhy?"},
    {"from": "gpt", "value": "Because."}]}`

    Source: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K
    """
    return dialogue(_exchanges(record)[:1], path_field(record, "image"))


def read_llava_dial(record: Record, rng: random.Random) -> Record:
    """Read every exchange of a LLaVA record (`conversation_58k.json`); the fields are those of `read_llava`.

    The reference pairs entries k and k + 1 instead of 2k and 2k + 1: it swaps the roles from the second turn on and
    never sees the second half.

    Source: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K
    """
    return dialogue(_exchanges(record), path_field(record, "image"))


def _exchanges(record: Record) -> list[tuple[str, str]]:
    turns = field(record, "conversations", list)
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise ValueError("The field 'conversations' has to be a list of dicts, each with a string 'value'.")
    # A dialogue may end with a question that nobody answered; it is left out.
    pairs = list(zip(turns[0::2], turns[1::2], strict=False))
    if not pairs or any((human.get("from"), gpt.get("from")) != ("human", "gpt") for human, gpt in pairs):
        raise ValueError("The field 'conversations' has to go from 'human' to 'gpt' in turns.")
    # The reference also deletes every line break, which joins words.
    return [(human["value"].replace("<image>", "").strip("\n"), gpt["value"]) for human, gpt in pairs]


# Text alone


def read_dolly(record: Record, rng: random.Random) -> Record:
    """Read an instruction of Dolly (`databricks-dolly-15k.jsonl`); an empty context is left out.

    `{"instruction": "...", "context": "...", "response": "...", "category": "closed_qa"}`

    Source: https://huggingface.co/datasets/databricks/databricks-dolly-15k
    """
    fields = [field(record, name, str) for name in ("instruction", "response", "context")]
    return exchange(fields[0], fields[1], [], fields[2])


def read_alpaca_gpt4(record: Record, rng: random.Random) -> Record:
    """Read an instruction of Alpaca GPT-4 (`alpaca_gpt4_data.json`); an empty input is left out.

    `{"instruction": "...", "input": "...", "output": "..."}`

    Source: https://github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM
    """
    fields = [field(record, name, str) for name in ("instruction", "output", "input")]
    return exchange(fields[0], fields[1], [], fields[2])


def read_baize(record: Record, rng: random.Random) -> Record:
    r"""Read a dialogue of Baize (`quora_chat_data.json`).

    `{"topic": "...", "input": "The conversation ...\n[|Human|] Hi!\n[|AI|] Hello!\n[|Human|] "}`. A human turn that
    nobody answers ends it; turns of one speaker in a row are one.

    The reference drops the last piece whatever it holds, deletes line breaks and fails on two turns in a row.

    Source: https://github.com/project-baize/baize-chatbot/tree/main/data
    """
    _, *pieces = re.split(r"\[\|(Human|AI)\|\]", field(record, "input", str))
    turns: list[tuple[str, str]] = []
    for speaker, text in zip(pieces[0::2], pieces[1::2], strict=True):
        if turns and turns[-1][0] == speaker:
            text = f"{turns.pop()[1]}\n{text.strip()}"
        turns.append((speaker, text.strip()))
    if turns and turns[0][0] == "AI":
        turns = turns[1:]
    pairs = [(human, reply) for (_, human), (_, reply) in zip(turns[0::2], turns[1::2], strict=False)]
    if not pairs:
        raise ValueError("The field 'input' has to hold a [|Human|] turn with an [|AI|] turn after it.")
    return dialogue(pairs)
