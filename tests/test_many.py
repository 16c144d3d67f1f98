"""Many chats at once in the server of examples/serve.py: replies as one after the other, cancels, failures."""

import asyncio
import io
import json
import logging
import statistics
import subprocess
import sys
import time
from contextlib import aclosing

import httpx
import pytest
import serve
import torch
from conftest import BASE, note_results
from PIL import Image
from starlette.middleware import Middleware
from starlette.testclient import TestClient
from test_image_files import data_url
from test_serving import ROOT, serving, text_part, user
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_mmgpt.speed import batching
from modeling_mmgpt.speed.serving import ManyAtOnce
from processing_mmgpt.image_files_mmgpt import square
from processing_mmgpt.serving.bounds import Bounds
from processing_mmgpt.serving.rendering import render
from processing_mmgpt.serving.replies import OneByOne, Prompt, written


def noise(number: int) -> Image.Image:
    """A picture like no other."""
    pixels = torch.randint(256, (60, 60, 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def base():
    return AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt(processor):
    """Make a prompt of a text and so many pictures."""

    def make(text: str, *pictures: Image.Image, **settings) -> Prompt:
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
        input_ids, images = render([{"role": "user", "content": content}], processor, 512)
        images = [square(image, processor.image_processor.size) for image in images]
        return Prompt(input_ids, images, **{"max_new_tokens": 12, **settings})

    return make


@pytest.fixture(scope="module")
def many(base, processor):
    engine = ManyAtOnce(base, processor, max_chats=4)
    yield engine
    engine.close()


async def read(engine, prompt):
    return [piece async for piece in written(engine, prompt)]


def reply(pieces):
    """Text, tokens and why it ended."""
    return "".join(text for text, _, _ in pieces), *pieces[-1][1:]


def web(engine, prompt, **others: Prompt) -> TestClient:
    """The web application, of which every chat asks for the same prompt, but those that name another."""

    class Ready:
        async def prepare(self, chat):
            return others.get(chat.messages[0].content, prompt)

    app = serve.build_app("tiny", Ready(), engine, middleware=[Middleware(Bounds, **serve.BOUNDS)])
    return TestClient(app, raise_server_exceptions=False)


CHAT = {"messages": [{"role": "user", "content": "circle:"}]}


def test_replies_at_once_are_those_of_one_after_the_other(base, processor, many, prompt):
    prompts = [prompt("circle:"), prompt("What is it?", noise(1)), prompt("And these?", noise(1), noise(2))]
    prompts += [prompt(f"square {number}:", noise(number), max_new_tokens=number) for number in range(3, 7)]
    stop = reply(asyncio.run(read(OneByOne(base, processor), prompts[1])))[0][3]
    prompts += [prompt("What is it?", noise(1), stops=("never said", stop))]

    async def ask(engine):
        return [reply(pieces) for pieces in await asyncio.gather(*(read(engine, one) for one in prompts))]

    expected, found = asyncio.run(ask(OneByOne(base, processor))), asyncio.run(ask(many))
    assert found == expected and {end for _, _, end in found} == {"stop", "length"}
    assert many.counts() == {"queued": 0, "pictures": 8, "pictures_encoded": 6}


def test_a_chat_samples_as_it_asks_to(many, prompt):
    async def ask(**settings):
        pieces = await asyncio.gather(*(read(many, prompt("circle:", **settings)) for _ in range(4)))
        return {reply(one)[0] for one in pieces}

    likeliest = asyncio.run(ask())
    assert asyncio.run(ask(temperature=2.0, top_p=0.001)) == likeliest
    assert len(likeliest) == 1 < len(asyncio.run(ask(temperature=2.0)))


def test_who_leaves_frees_the_place_and_the_pictures_of_a_chat(many, prompt, monkeypatch):
    monkeypatch.setitem(many.engine.settings, "eos_token_id", -1)
    scheduler, handlers = many.engine.manager.batch_processor.scheduler, many.engine.manager.output_router
    pictures = [noise(100 + number) for number in range(32)]  # of two chats, and there are 16 slots

    async def leave():
        async with aclosing(many.write(prompt("a", *pictures[:16], max_new_tokens=300))) as texts:
            await anext(texts)
            waiting = asyncio.create_task(read(many, prompt("b", *pictures[16:], max_new_tokens=300)))
            await asyncio.sleep(0.3)
            assert many.counts()["queued"] == 1 and not waiting.done()
            waiting.cancel()
        pieces = await read(many, prompt("c", *pictures[8:24], max_new_tokens=3))
        return reply(pieces)[1], len(scheduler.active_requests), many.counts()["queued"]

    assert asyncio.run(leave()) == (3, 0, 0)
    assert not handlers.result_handlers


def test_a_prompt_without_room_is_refused_and_nobody_waits_for_it(many, prompt):
    answer = web(many, prompt("a", max_new_tokens=10**6)).post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 400 and "room" in answer.json()["error"]["message"]
    assert not many.engine.manager.output_router.result_handlers


@pytest.mark.parametrize("why", ["no room", "no memory"])
def test_an_error_over_one_chat_is_told_in_its_stream_and_nobody_else_is_disturbed(many, prompt, monkeypatch, why):
    def encode(pictures):
        if pictures:
            raise MemoryError("too little for a picture")

    honest = prompt("circle:", max_new_tokens=20)
    if why == "no room":
        told, kind, failing = "there is room for 1 to 512", "invalid_request_error", prompt("a", max_new_tokens=10**6)
    else:
        monkeypatch.setattr(many.engine.pool, "encode", encode)
        told, kind, failing = serve.FAILED, "server_error", prompt("a", noise(1000))
    alone = asyncio.run(read(many, honest))

    async def ask():
        transport = httpx.ASGITransport(web(many, honest, failing=failing).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            chats = [CHAT, {"messages": [{"role": "user", "content": "failing"}]}, CHAT, CHAT]
            bodies = [{**chat, "stream": True} for chat in chats]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    answers = [
        [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        for answer in asyncio.run(ask())
    ]
    error = answers.pop(1)[-1]["error"]
    assert told in error["message"] and error["type"] == kind
    said = ["".join(e["choices"][0]["delta"].get("content", "") for e in events) for events in answers]
    assert said == [reply(alone)[0]] * 3 and many.error is None
    assert not many.engine.manager.output_router.result_handlers


@pytest.mark.parametrize("why", ["has no request_queue", "knows of no paged cache"])
def test_where_the_engine_cannot_run_chats_are_answered_one_after_the_other_with_a_warning(
    base, processor, prompt, monkeypatch, caplog, why
):
    if "queue" in why:
        monkeypatch.setattr(batching, "ATTRIBUTES", ("request_queue",))
    else:
        monkeypatch.setattr(type(base.model.text_model), "_supports_attention_backend", False)
    monkeypatch.setattr(serve, "logger", logging.getLogger("tests"))  # uvicorn keeps its own from the root
    engine = serve.build_engine(base, processor, "auto", 4)
    assert isinstance(engine, OneByOne) and why in caplog.text and "one after the other" in caplog.text
    answer = web(engine, prompt("circle:")).post("/v1/chat/completions", json=CHAT)
    assert answer.json()["usage"]["completion_tokens"] > 0
    with pytest.raises((ImportError, ValueError), match=why):
        serve.build_engine(base, processor, "batched", 4)


def test_what_the_server_does_is_told_in_numbers(many, prompt):
    client = web(many, prompt("What is it?", noise(1)))
    tokens = client.post("/v1/chat/completions", json=CHAT).json()["usage"]["completion_tokens"]
    told = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(told["mmgpt_tokens_total"]) == tokens > 0 and float(told["mmgpt_first_token_seconds_count"]) == 1
    assert float(told["mmgpt_chats_waiting"]) == float(told["mmgpt_chats_running"]) == 0
    assert float(told["mmgpt_pictures"]) >= float(told["mmgpt_pictures_encoded"]) > 0 == float(told["mmgpt_queued"])


def test_a_dead_engine_is_told_to_chats_and_to_who_asks_for_its_health(processor, prompt):
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    engine = ManyAtOnce(model, processor, max_chats=2)
    client = web(engine, prompt("circle:"))
    assert client.get("/health").json() == {"status": "ok"}
    model.model.text_model.forward = lambda **kwargs: (_ for _ in ()).throw(MemoryError("too little"))
    assert client.post("/v1/chat/completions", json=CHAT).status_code in (500, 503)
    while engine.error is None:
        time.sleep(0.01)
    chats = [client.post("/v1/chat/completions", json={**CHAT, "stream": stream}) for stream in (False, True)]
    for answer in (*chats, client.get("/health")):
        assert answer.status_code == 503 and "died" in answer.json()["error"]["message"]
    assert "too little" in answer.json()["error"]["message"]
    engine.close()


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", None, "float32"), ("cpu", "auto", "auto"), ("cuda:0", None, "auto"), ("cuda:0", "float16", "float16")],
)
def test_the_data_type_is_float32_on_a_cpu_and_else_the_models_own(device, dtype, expected):
    assert serve.loading(device, dtype, "none") == {"device_map": device, "dtype": expected}
    computed = serve.loading(device, dtype, "nf4")["quantization_config"].bnb_4bit_compute_dtype
    assert computed == (torch.bfloat16 if expected == "auto" else getattr(torch, expected))


# Bars

ALONE = 21  # chats that are alone

# Asks all at once, and tells the replies with the seconds from the first question to the last answer.
AT_ONCE = """
import asyncio, json, sys, time
import openai

async def main():
    client = openai.AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=600)
    for line in sys.stdin:
        plan, start = json.loads(line), time.perf_counter()
        ask = lambda arguments: client.chat.completions.create(model="base", **arguments)
        if plan["at_once"]:
            replies = await asyncio.gather(*map(ask, plan["chats"]))
        else:
            replies = [await ask(arguments) for arguments in plan["chats"]]
        seconds = time.perf_counter() - start
        told = {"texts": [reply.choices[0].message.content for reply in replies], "seconds": seconds}
        print(json.dumps(told | {"tokens": sum(reply.usage.completion_tokens for reply in replies)}), flush=True)

asyncio.run(main())
"""


def chats(first: int, count: int, tokens: int) -> list[dict]:
    """Chats about a picture of its own each."""
    made = []
    for number in range(first, first + count):
        file = io.BytesIO()
        noise(number).save(file, "PNG")
        picture = {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}
        messages = [user(picture, text_part(f"Tell a long story of {number}, and of what is in it:"))]
        made.append({"messages": messages, "max_tokens": tokens})
    return made


class Client:
    """Asks a server, from a process of its own."""

    def __init__(self, url: str):
        command = [sys.executable, "-c", AT_ONCE, f"{url}/v1"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, asked: list[dict], at_once: bool) -> dict:
        self.process.stdin.write(json.dumps({"chats": asked, "at_once": at_once}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


@pytest.mark.bars
def test_many_chats_at_once_are_answered_sooner_than_one_after_the_other(tmp_path):
    with serving(BASE, tmp_path / "one", "--engine", "one") as one, serving(BASE, tmp_path / "many") as many:
        before, now = Client(one[0]), Client(many[0])
        rates, equal, number = {}, 0, 0

        def rate(name: str, told: dict) -> None:
            rates.setdefault(name, []).append(told["tokens"] / told["seconds"])

        for client in before, now:
            client.ask(chats(number, 4, 60), True)
        for count in (1, 16, 32):
            for _ in range(ALONE if count == 1 else 3):
                number += count
                asked = chats(number, count, 60)
                expected, found = before.ask(asked, False), now.ask(asked, True)
                rate(f"{count} one after the other", expected)
                rate(f"{count} at once", found)
                equal += sum(a == b for a, b in zip(expected["texts"], found["texts"], strict=True))
        before.close()
        now.close()
    tokens = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    times = {count: tokens[f"{count} at once"] / tokens[f"{count} one after the other"] for count in (1, 16, 32)}
    figures = {"tokens a second": tokens, "times as fast": {str(n): round(t, 2) for n, t in times.items()}}
    note_results("many", figures | {"chats": ALONE + 3 * 48, "equal replies": equal})
    assert equal == ALONE + 3 * 48
    assert times[1] >= 1 / 1.05 and times[16] >= 3 and times[32] >= 4


@pytest.mark.bars
def test_the_program_that_times_chats_asks_all_of_them(tmp_path):
    options = ["--chats", "1", "5", "--tokens", "8", "--rounds", "1"]
    with serving(BASE, tmp_path / "server") as server:
        done = subprocess.run(
            [sys.executable, "examples/measurements/serving.py", *options, f"{server[0]}/v1"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        told = httpx.get(f"{server[0]}/metrics").text
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["chats"] for row in rows] == [1, 5] and rows[1]["tokens_s"] > rows[0]["tokens_s"] > 0
    assert all(0 < row["between_ms"][0] <= row["between_ms"][1] < row["first_ms"][0] for row in rows)
    assert "mmgpt_first_token_seconds_count 12.0" in told
