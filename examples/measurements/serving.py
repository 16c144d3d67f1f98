"""Time chats that come at the same moment to a server of `examples/serve.py`, as its clients see them.

    python examples/serve.py outputs/quickstart/adapter --port 8000              # in another shell
    python examples/measurements/serving.py http://127.0.0.1:8000/v1 --chats 1 8 32

A chat is a question about a JPEG of its own, and its reply is streamed. For each number of chats a line of JSON, the
medians of some rounds after one that warms up: tokens a second of all replies, and the 50th and 95th percentile of the
times to the first piece of text and between pieces, in ms. It takes OpenAI's client (`pip install openai`).
"""

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import random
import statistics
import time
from itertools import chain, count, islice

import numpy as np
from openai import AsyncOpenAI
from PIL import Image


def chat(number: int, tokens: int) -> dict:
    """What is asked; no two numbers show the same picture."""
    small = Image.frombytes("RGB", (16, 12), random.Random(number).randbytes(16 * 12 * 3))
    file = io.BytesIO()
    small.resize((640, 480)).save(file, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Tell a long story of it."}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "stream": True}


async def ask(client: AsyncOpenAI, model: str, asked: dict) -> dict:
    """Ask, and tell the tokens of the reply, and by the clock of the machine when it began, spoke and ended."""
    told = {"began": time.monotonic(), "spoke": [], "tokens": 0}
    async for piece in await client.chat.completions.create(model=model, **asked):
        if piece.usage is not None:
            told["tokens"] = piece.usage.completion_tokens
        if piece.choices and piece.choices[0].delta.content:
            told["spoke"].append(time.monotonic())
    return told | {"ended": time.monotonic()}


def ask_all(url: str, numbers: list[int], tokens: int, start: float) -> list[dict]:
    """Ask some chats at a moment of the machine's clock, in a process of its own."""
    asked = [chat(number, tokens) for number in numbers]

    async def run() -> list[dict]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
            model = (await client.models.list()).data[0].id
            await asyncio.sleep(max(0, start - time.monotonic()))
            return await asyncio.gather(*(ask(client, model, one) for one in asked))

    return asyncio.run(run())


def percentiles(seconds: list[float]) -> list[float]:
    """The 50th and the 95th percentile, in ms."""
    return [round(1e3 * value, 1) for value in np.percentile(seconds, (50, 95)).tolist()]


def time_chats(pool: multiprocessing.Pool, url: str, numbers: list[int], tokens: int, processes: int) -> dict:
    """Ask all at once, and time them.

    Raises:
        RuntimeError: If no reply has two pieces of text, between which there is a time.
    """
    start = time.monotonic() + 0.5 + 0.01 * len(numbers)  # by then the pictures are made
    shares = [share for first in range(processes) if (share := numbers[first::processes])]
    told = list(chain(*pool.starmap(ask_all, [(url, share, tokens, start) for share in shares])))
    seconds = max(one["ended"] for one in told) - min(one["began"] for one in told)
    between = [b - a for one in told for a, b in zip(one["spoke"], one["spoke"][1:], strict=False)]
    if not between:
        raise RuntimeError("No reply has two pieces of text: give more --tokens, or ask a model that writes some.")
    return {
        "tokens_s": sum(one["tokens"] for one in told) / seconds,
        "first_ms": percentiles([one["spoke"][0] - one["began"] for one in told if one["spoke"]]),
        "between_ms": percentiles(between),
    }


def main() -> None:
    """Ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--chats", type=int, nargs="+", default=[1, 8, 32], help="that come at once")
    parser.add_argument("--tokens", type=int, default=64, help="of a reply, at most")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed, after one that warms up")
    parser.add_argument("--processes", type=int, default=4, help="that ask")
    args = parser.parse_args()
    numbers = count()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for at_once in args.chats:
            rounds = [
                time_chats(pool, args.url, list(islice(numbers, at_once)), args.tokens, args.processes)
                for _ in range(1 + args.rounds)
            ][1:]
            row = {"chats": at_once, "tokens_s": round(statistics.median(one["tokens_s"] for one in rounds), 1)}
            for name in ("first_ms", "between_ms"):
                row[name] = [statistics.median(one[name][place] for one in rounds) for place in (0, 1)]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
