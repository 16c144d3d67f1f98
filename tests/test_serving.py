"""The server of examples/serve.py, asked by OpenAI's own client from another process."""

import base64
import http.client
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from test_image_files import (
    ANSWERS,
    DISGUISES,
    DNS,
    FILES,
    HOST,
    INSIDE,
    REDIRECTS,
    SCHEMES,
    TEXTS,
    TO_HOST,
    Internet,
    data_url,
    refuse,
)
from tiny_world import evaluation
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_mmgpt.adapters_mmgpt import lora_config


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"
RESULTS = Path(__file__).with_name("results")
LONGEST = 40  # tokens of a reply
SOAK_SECONDS = float(os.environ.get("MMGPT_SOAK_SECONDS", "600"))

# Reads requests off the standard input, `{name: arguments}`, and writes what comes back.
CLIENT = """
import json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)

def ask(arguments):
    try:
        reply = client.chat.completions.create(**arguments)
        if not arguments.get("stream"):
            choice = reply.choices[0]
            return {"text": choice.message.content, "end": choice.finish_reason, "usage": reply.usage.model_dump(),
                    "model": reply.model}
        pieces = list(reply)
        texts = [piece.choices[0].delta.content or "" for piece in pieces]
        return {"text": "".join(texts), "pieces": sum(map(bool, texts)), "end": pieces[-1].choices[0].finish_reason}
    except openai.APIStatusError as error:
        return {"status": error.status_code, "message": str(error.body)}

answers = {name: ask(arguments) for name, arguments in json.load(sys.stdin).items()}
answers["models"] = [model.id for model in client.models.list()]
print(json.dumps(answers))
"""

# 50 chats at once until the time is over, or given up at random.
SOAK = """
import asyncio, json, random, sys, time
import openai

plan = json.load(sys.stdin)
client = openai.AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=300)
counts = {"finished": 0, "vanished": 0, "wrong": 0}
end = time.monotonic() + plan["seconds"]

async def read(arguments, stop_after):
    reply = await client.chat.completions.create(**arguments)
    if not arguments.get("stream"):
        return reply.choices[0].message.content
    text, number = "", 0
    async with reply:
        async for piece in reply:
            text += piece.choices[0].delta.content or ""
            number += 1
            if number == stop_after:
                return None
    return text

async def chat(rng):
    while time.monotonic() < end:
        case = rng.choice(plan["cases"])
        arguments = {**case["arguments"], "stream": rng.random() < 0.5}
        vanishes = rng.random() < 0.3
        try:
            limit = rng.uniform(0.05, 20) if vanishes else None
            text = await asyncio.wait_for(read(arguments, rng.randrange(1, 12) if vanishes else None), limit)
        except (TimeoutError, asyncio.TimeoutError):
            text = None
        if text is None:
            counts["vanished"] += 1
        else:
            counts["finished"] += 1
            counts["wrong"] += text != case["text"]

async def main():
    await asyncio.gather(*(chat(random.Random(number)) for number in range(50)))

asyncio.run(main())
print(json.dumps(counts))
"""


@contextmanager
def serving(model: Path, log: Path, *options: str):
    """Run the server; gives its address and process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "examples/serve.py", str(model), "--port", "0", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(2400):
            if (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())) or process.poll():
                break
            time.sleep(0.1)
        assert found, log.read_text()
        yield found[1], process
    finally:
        process.terminate()
        process.wait(20)


def ask(url: str, program: str, given) -> dict:
    command = [sys.executable, "-c", program, f"{url}/v1"]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=SOAK_SECONDS + 300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def post(url: str, body, timeout: float = 60) -> tuple[int, str]:
    """Send a body to the server, as it is if it is bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that changes what the base says, with its processor."""
    folder = tmp_path_factory.mktemp("serving") / "adapter"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    tuned = get_peft_model(model, lora_config(model, r=4, init_lora_weights=False, base_model_name_or_path=str(BASE)))
    tuned.save_pretrained(folder)
    AutoProcessor.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(adapter, tmp_path_factory):
    with serving(adapter, tmp_path_factory.mktemp("log") / "log", "--max-new-tokens", str(LONGEST)) as running:
        yield running[0]


def picture_part(name: str = "colour") -> dict:
    data = (ROOT / "examples" / "records" / f"{name}.png").read_bytes()
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


CHATS = {
    "text": [user("circle:")],
    "system": [{"role": "system", "content": "Say it."}, user("circle:")],
    "picture": [user(picture_part(), text_part("What is it?"))],
    "turns": [
        user(picture_part(), text_part("What is it?")),
        {"role": "assistant", "content": "blue"},
        user(text_part("And this?"), picture_part("reading")),
    ],
}
EXTRA = {
    "stopped": {"messages": CHATS["picture"], "stop": ["STOP"]},
    "short": {"messages": CHATS["text"], "max_tokens": 3},
    "sampled": {"messages": CHATS["text"], "temperature": 2.0, "max_completion_tokens": 20},
    "greedy": {"messages": CHATS["text"], "temperature": 0.0},
    "unspelt stop": {"messages": CHATS["text"], "stop": "\u4f60"},
    "far too long": {"messages": CHATS["text"], "max_tokens": 10**9},
}
REFUSED = {
    "other model": ({"model": "gpt-4o"}, "pinned"),
    "two replies": ({"n": 2}, "n: "),
    "seed": ({"seed": 1}, "seed"),
    "template": ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "chat_template_kwargs"),
    "settings": ({"extra_body": {"generation_config": '{"num_beams": 9999}'}}, "generation_config"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "temperature": ({"temperature": -1}, "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "empty stop": ({"stop": [""]}, "stop"),
    "picture between texts": ({"messages": [user(text_part("a"), picture_part(), text_part("b"))]}, "few-shot form"),
    "no messages": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "role"),
    "reply to nothing": ({"messages": [{"role": "assistant", "content": "a"}]}, "Message 0"),
    "video": ({"messages": [user({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}})]}, "video_url"),
    "too long": ({"messages": [user("circle: " * 600)]}, "512"),
    "many pictures": ({"messages": [user(*[picture_part()] * 17)]}, "16"),
    "much text": ({"messages": [user(*[text_part("a" * 300_000)] * 4)]}, "1,000,000"),
    "path": ({"messages": [user({"type": "image_url", "image_url": {"url": "/etc/passwd"}})]}, "data URL"),
    "file": ({"messages": [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]}, "data URL"),
    "address": (
        {"messages": [user({"type": "image_url", "image_url": {"url": "http://a.example/a.png"}})]},
        "a.example",
    ),
}


@pytest.fixture(scope="module")
def answers(server):
    requests = {name: {"messages": messages} for name, messages in CHATS.items()} | EXTRA
    requests |= {f"{name} streamed": {**arguments, "stream": True} for name, arguments in requests.items()}
    requests |= {name: {"messages": CHATS["text"], **arguments} for name, (arguments, _) in REFUSED.items()}
    letter = ask(server, CLIENT, {"picture": {"model": "adapter", "messages": CHATS["picture"]}})["picture"]["text"][
        12
    ]
    for name in ("stopped", "stopped streamed"):
        requests[name] = {**requests[name], "stop": [letter, "never said"]}
    asked = {name: {"model": "adapter", **arguments} for name, arguments in requests.items()}
    return ask(server, CLIENT, asked) | {"stop": letter}


@pytest.fixture(scope="module")
def expected(adapter):
    """What the adapter, and the base alone, say without a server."""

    def says(model, messages):
        pictures = [
            Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image_url"
        ]
        ours = json.loads(json.dumps(messages).replace('"image_url"', '"image"', 0))
        for message in ours:
            if not isinstance(message["content"], str):
                message["content"] = [
                    {"type": "image"} if part["type"] == "image_url" else part for part in message["content"]
                ]
        inputs = processor.apply_chat_template(
            ours, images=pictures, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        ids = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    processor = AutoProcessor.from_pretrained(adapter)
    models = [
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval() for path in (adapter, BASE)
    ]
    return {name: [says(model, messages) for model in models] for name, messages in CHATS.items()}


@pytest.mark.parametrize("name", CHATS)
def test_the_server_says_what_the_adapter_says(answers, expected, name):
    tuned, base = expected[name]
    assert answers[name]["text"] == answers[f"{name} streamed"]["text"] == tuned
    assert tuned and tuned != base
    assert answers[name]["model"] == "adapter" and answers["models"] == ["adapter"]


def test_a_stream_comes_in_pieces(answers):
    assert answers["picture streamed"]["pieces"] > 3


def test_a_reply_ends_before_its_stop_sequence(answers, expected):
    whole = expected["picture"][0]
    before = whole[: whole.index(answers["stop"])]
    assert answers["stopped"]["text"] == answers["stopped streamed"]["text"] == before
    assert answers["stopped"]["end"] == answers["stopped streamed"]["end"] == "stop"
    assert answers["stopped"]["usage"]["completion_tokens"] < answers["picture"]["usage"]["completion_tokens"]
    assert answers["unspelt stop"]["text"] == expected["text"][0]


def test_a_reply_has_at_most_the_tokens_asked_for_and_those_of_the_server(answers):
    assert answers["short"]["usage"]["completion_tokens"] == 3 and answers["short"]["end"] == "length"
    assert answers["short streamed"]["end"] == "length"
    assert answers["far too long"]["usage"]["completion_tokens"] <= LONGEST


def test_sampling_is_asked_for_by_a_temperature(answers, expected):
    assert answers["greedy"]["text"] == expected["text"][0] != answers["sampled"]["text"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_server_would_not_do_is_refused_with_a_sentence(answers, name):
    assert answers[name].get("status") == 400 and REFUSED[name][1] in answers[name]["message"], answers[name]


BODIES = {
    "no json": (b"{", 400),
    "deep": (b"[" * 100_000, 400),
    "no body": (b"", 400),
    "a list": (b"[]", 400),
    "not a number": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused_and_the_server_lives(server, name):
    body, status = BODIES[name]
    assert post(server, body)[0] == status
    assert json.loads(urllib.request.urlopen(f"{server}/health").read()) == {"status": "ok"}


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server):
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    assert connection.getresponse().status == 413


@pytest.mark.parametrize(
    "path", ["/load_model", "/reset", "/v1/responses", "/v1/completions", "/docs", "/openapi.json"]
)
def test_nothing_else_is_served(server, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(server + path, b'{"model": "gpt2"}'))
    assert caught.value.code == 404


def test_a_page_of_another_origin_can_neither_ask_nor_reach_the_server_by_its_own_name(server, foreign_page):
    ask = """async ([address, body]) => {
        await fetch(address, {method: 'POST', mode: 'no-cors', body, headers: {'Content-Type': 'text/plain'}});
    }"""
    body = json.dumps({"messages": CHATS["text"]})
    with foreign_page.expect_response("**/v1/chat/completions") as answer:
        foreign_page.evaluate(ask, [f"{server}/v1/chat/completions", body])
    assert answer.value.status == 403 and post(server, body.encode())[0] == 200
    assert foreign_page.goto(server.replace("127.0.0.1", "rebound.example") + "/v1/models").status == 400


def test_an_abandoned_reply_that_is_not_streamed_is_no_longer_computed(server):
    body = json.dumps({"messages": CHATS["text"], "max_tokens": LONGEST}).encode()
    start = time.monotonic()
    post(server, body)
    alone = time.monotonic() - start
    abandoned = [http.client.HTTPConnection(server.removeprefix("http://")) for _ in range(60)]
    for connection in abandoned:
        connection.request("POST", "/v1/chat/completions", body)
    time.sleep(0.3)
    for connection in abandoned:
        connection.close()
    start = time.monotonic()
    assert post(server, body)[0] == 200
    assert time.monotonic() - start < 20 * alone


# Bars


def note(name: str, figures: dict, command: str) -> None:
    """Keep the last figures of a bar, with what they were measured with."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(evaluation.measured_with(command) | figures, indent=1, sort_keys=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")


@pytest.mark.bars
def test_every_attack_is_refused_nothing_is_reached_and_the_server_lives(monkeypatch, tmp_path):
    internet = Internet(monkeypatch)
    port = internet.server.server_port
    sent = {"files": [data_url(data) for data in FILES.values()], "texts": [*TEXTS.values()]}
    sent |= {
        "schemes": [*SCHEMES.values()],
        "disguises": [u.format(inside=internet.inside) for u in DISGUISES.values()],
    }
    sent["inside"] = [f"http://{host}:{port}/secret.png" for host in INSIDE]
    allowed = [HOST, *(f"{host.strip('[]').lower()}:{port}" for host in INSIDE)]
    counts = {}
    with serving(
        BASE, tmp_path / "log", *(option for host in allowed for option in ("--image-host", host))
    ) as running:
        url, process = running
        monkeypatch.undo()
        for kind, sources in sent.items():
            for source in sources:
                messages = [user({"type": "image_url", "image_url": {"url": source}}, text_part("What is it?"))]
                status, answer = post(url, {"messages": messages})
                assert status in (400, 413) and "message" in answer or status == 413, (source[:80], status, answer)
            counts[kind] = {"attacks": len(sources), "refused": len(sources)}
        assert post(url, {"messages": CHATS["picture"]})[0] == 200 and process.poll() is None
    assert not internet.server.hits
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(__import__("socket"), name, getattr(internet, name))
    paths = [("redirect", target) for target in REDIRECTS.values()] + [(name, "") for name in ANSWERS]
    for path, target in paths:
        internet.server.location = target.format(inside=internet.inside, quoted="%2F")
        refuse(f"http://{HOST}/{path}", TO_HOST)
    for lookups in DNS.values():
        internet.names[HOST], internet.server.location = list(lookups), f"http://{HOST}/secret.png"
        refuse(f"http://{HOST}/redirect", TO_HOST)
    assert not any("secret" in hit for hit in internet.server.hits)
    counts["answers of an allowed host"] = {"attacks": len(paths) + len(DNS), "refused": len(paths) + len(DNS)}
    total = sum(count["attacks"] for count in counts.values())
    note(
        "pictures",
        {"attacks": total, "refused": total, "reached": 0, "kinds": counts},
        "pytest -m bars tests/test_serving.py",
    )


@pytest.mark.bars
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fifty_chats_at_once_with_clients_that_vanish(adapter, tmp_path, dtype):
    seconds = SOAK_SECONDS if dtype == "float32" else min(SOAK_SECONDS, 120)
    rng = random.Random(0)
    words = "circle square star heart red blue plane barn carrot".split()
    cases = [[user(f"{rng.choice(words)} {rng.choice(words)} {number}:")] for number in range(20)]
    cases += [[user(picture_part(), text_part(f"What is {rng.choice(words)}?"))] for _ in range(15)] + [CHATS["turns"]]
    requests = {
        str(n): {"model": "adapter", "messages": messages, "max_tokens": 24} for n, messages in enumerate(cases)
    }
    with serving(adapter, tmp_path / "log", "--dtype", dtype) as (url, process):
        alone = ask(url, CLIENT, requests)
        plan = [{"arguments": requests[name], "text": alone[name]["text"]} for name in requests]
        memory, start = [], time.monotonic()
        command = [sys.executable, "-c", SOAK, f"{url}/v1"]
        client = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        client.stdin.write(json.dumps({"cases": plan, "seconds": seconds}))
        client.stdin.close()
        while client.poll() is None:
            memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            time.sleep(1)
            assert time.monotonic() - start < seconds + 300
        errors, counts = client.stderr.read(), json.loads(client.stdout.read() or "{}")
        assert client.returncode == 0, errors
        again = ask(url, CLIENT, requests)
    quarter = len(memory) // 4
    before, after = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    figures = {"seconds": seconds, "dtype": dtype, "chats_at_once": 50, "memory_mib_second_quarter": round(before, 1)}
    if dtype == "bfloat16":  # there a reply depends on what else is under way
        counts["unlike alone"] = counts.pop("wrong")
    figures |= {"memory_mib_last_quarter": round(after, 1), **counts}
    name = "serving_soak" if dtype == "float32" else f"serving_soak_{dtype}"
    note(name, figures, "pytest -m bars tests/test_serving.py")
    assert counts.get("wrong", 0) == 0
    assert counts["finished"] > 50 and counts["vanished"] > 20
    assert {name: again[name]["text"] for name in requests} == {name: alone[name]["text"] for name in requests}
    assert after < 1.05 * before
