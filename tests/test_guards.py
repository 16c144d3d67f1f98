"""The guards of the servers, each alone: bounds, callers, deadlines, processes, stop sequences, and the schema."""

import asyncio
import io
import json
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import serve
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from test_image_files import HOST, REDIRECTS, TO_HOST, Internet, data_url

from processing_mmgpt.image_files_mmgpt import ImagePolicy, open_image, square
from processing_mmgpt.serving import running
from processing_mmgpt.serving.bounds import SMALL, Bounds
from processing_mmgpt.serving.callers import callers
from processing_mmgpt.serving.chats import count_elements
from processing_mmgpt.serving.pictures import WORKER, PictureDecoder
from processing_mmgpt.serving.rendering import render
from processing_mmgpt.serving.replies import find_first, until_stop, write


# Bounds


class Client:
    """A request to an ASGI application, whose body comes piece by piece."""

    def __init__(self, app, method: str = "POST"):
        self.inbox, self.sent = asyncio.Queue(), []
        scope = {"type": "http", "method": method, "path": "/", "headers": []}
        self.task = asyncio.create_task(app(scope, self.inbox.get, self._send))

    async def _send(self, message):
        self.sent.append(message)

    def give(self, body: bytes, more: bool = False) -> "Client":
        self.inbox.put_nowait({"type": "http.request", "body": body, "more_body": more})
        return self

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None


class Slow:
    """An application that answers when it is told to."""

    def __init__(self):
        self.go, self.cancelled, self.bodies = asyncio.Event(), 0, []

    async def __call__(self, scope, receive, send):
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        self.bodies.append(len(body))
        if body.startswith(b"let go"):
            scope["state"]["let_go"]()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await PlainTextResponse("done")(scope, receive, send)


LIMITS = {"max_body": 4 * SMALL, "max_held": 5 * SMALL, "max_at_work": 2, "seconds": 0.2, "rate": 1e9, "pause": 0.0}


def run(test):
    """Run a test of one slow application within bounds."""

    async def main():
        app = Slow()
        await test(app, Bounds(app, **LIMITS))

    asyncio.run(main())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_half_sent_body_takes_no_place_and_is_given_up_in_time():
    async def test(app, bounds):
        halves = [Client(bounds).give(b"half", more=True) for _ in range(20)]
        whole = Client(bounds).give(b"who").give(b"le")
        whole = Client(bounds).give(b"who", more=True).give(b"le")
        await settle()
        assert app.bodies[-1] == 5
        app.go.set()
        await whole.task
        await asyncio.gather(*(half.task for half in halves))
        assert whole.status == 200 and {half.status for half in halves} == {408}
        assert bounds.held == bounds.at_work == 0 and not bounds.bodies

    run(test)


def test_more_requests_than_are_worked_on_are_told_so_and_what_has_no_body_is_answered():
    async def test(app, bounds):
        clients = [Client(bounds).give(b"chat") for _ in range(3)]
        health = Client(bounds, "GET").give(b"")
        await settle()
        assert clients[2].status == 503 and app.bodies == [4, 4, 0]
        app.go.set()
        await asyncio.gather(*(client.task for client in [*clients, health]))
        assert [client.status for client in clients] == [200, 200, 503] and health.status == 200
        again = Client(bounds).give(b"chat")
        await again.task
        assert again.status == 200

    run(test)


def test_who_has_gone_is_worked_for_no_longer():
    async def test(app, bounds):
        clients = [Client(bounds).give(b"chat") for _ in range(2)]
        await settle()
        clients[0].leave()
        await settle()
        assert clients[0].task.done() and app.cancelled == 1 and bounds.at_work == 1
        app.go.set()
        await clients[1].task
        assert clients[1].status == 200 and clients[0].sent == []

    run(test)


def test_refusals_go_out_one_after_the_other_and_hold_up_no_answer():
    async def main():
        app = Slow()
        app.go.set()
        bounds = Bounds(app, **{**LIMITS, "pause": 0.1})
        refused = [Client(bounds).give(b"x" * 5 * SMALL) for _ in range(3)]
        answered = Client(bounds).give(b"chat")
        await settle()
        assert answered.status == 200 and [client.status for client in refused] == [None] * 3
        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(client.task for client in refused))
        assert [client.status for client in refused] == [413] * 3
        assert asyncio.get_running_loop().time() - start > 0.2

    asyncio.run(main())


def test_a_body_is_as_large_as_is_allowed():
    async def test(app, bounds):
        app.go.set()
        fits, larger = Client(bounds), Client(bounds)
        for _ in range(4):
            fits.give(b"x" * SMALL, more=True)
            larger.give(b"x" * SMALL, more=True)
        fits.give(b"")
        larger.give(b"x")
        await asyncio.gather(fits.task, larger.task)
        assert (fits.status, larger.status) == (200, 413) and app.bodies == [4 * SMALL]

    run(test)


def test_of_bodies_that_do_not_fit_together_the_oldest_that_is_still_sent_is_given_up():
    async def test(app, bounds):
        at_work = Client(bounds).give(b"x" * 2 * SMALL)
        await settle()
        oldest = Client(bounds).give(b"x" * 2 * SMALL, more=True)
        await settle()
        newest = Client(bounds).give(b"x" * 3 * SMALL)
        await settle()
        assert oldest.status == 408 and bounds.held == 5 * SMALL and app.bodies == [2 * SMALL, 3 * SMALL]
        app.go.set()
        await asyncio.gather(at_work.task, newest.task)
        assert at_work.status == newest.status == 200 and bounds.held == 0

    run(test)


def test_a_large_body_that_does_not_fit_beside_those_at_work_is_refused_and_a_small_one_is_not():
    async def test(app, bounds):
        first = Client(bounds).give(b"x" * 4 * SMALL)
        await settle()
        large, small = Client(bounds).give(b"x" * 2 * SMALL), Client(bounds).give(b"x" * SMALL)
        await settle()
        assert large.status == 503 and app.bodies == [4 * SMALL, SMALL]
        app.go.set()
        await asyncio.gather(first.task, small.task)

    run(test)


def test_a_body_that_the_application_holds_no_more_makes_room():
    async def test(app, bounds):
        first = Client(bounds).give(b"let go" + b"x" * 3 * SMALL)
        await settle()
        second = Client(bounds).give(b"x" * 4 * SMALL)
        await settle()
        assert bounds.held == 4 * SMALL and len(app.bodies) == 2
        app.go.set()
        await asyncio.gather(first.task, second.task)
        assert first.status == second.status == 200

    run(test)


# Callers


async def answer(_):
    return PlainTextResponse("here")


async def talk(websocket):
    await websocket.accept()
    await websocket.close()


ROUTES = [Route("/", answer, methods=["GET", "POST"]), Route("/health", answer), WebSocketRoute("/ws", talk)]


def caller(*hosts: str, key: str | None = None, base: str = "http://127.0.0.1:8000") -> TestClient:
    return TestClient(Starlette(routes=ROUTES, middleware=callers(hosts, key)), base_url=base)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("mine.example:80", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("127.0.0.1@evil.example", 400),
        ("", 400),
    ],
)
def test_the_server_answers_to_its_own_names(host, status):
    assert caller("mine.example").get("/", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://evil.example", 403),
        ("http://127.0.0.1:9000", 403),
        ("http://127.0.0.1", 403),
        ("null", 403),
        ("http://[", 403),
        ("", 403),
    ],
)
def test_pages_of_other_origins_are_refused(origin, status):
    assert caller().post("/", headers={"Origin": origin}).status_code == status


def test_a_page_of_another_origin_gets_no_websocket():
    with caller().websocket_connect("/ws", headers={"Origin": "http://127.0.0.1:8000", "Host": "127.0.0.1:8000"}):
        pass
    with pytest.raises(WebSocketDenialResponse, check=lambda denied: denied.status_code == 403):
        with caller().websocket_connect("/ws", headers={"Origin": "http://evil.example", "Host": "127.0.0.1:8000"}):
            pass


def test_a_key_is_asked_for_where_there_is_one():
    client = caller(key="käse")
    given = {"right": "Bearer käse", "wrong": "Bearer kase", "bare": "käse", "empty": ""}
    answers = {n: client.get("/", headers={"Authorization": v.encode()}).status_code for n, v in given.items()}
    assert answers == {"right": 200, "wrong": 401, "bare": 401, "empty": 401}
    assert client.get("/").status_code == 401 and client.get("/health").status_code == 200


# Deadlines of a connection


@pytest.fixture
def hurried(monkeypatch):
    """The port of a server that waits half a second for a head, and answers `/slow` after one and a half."""
    monkeypatch.setattr(running, "HEAD_SECONDS", 0.5)

    async def slow(_):
        await asyncio.sleep(1.5)
        return PlainTextResponse("at last")

    app = Starlette(routes=[Route("/", answer), Route("/slow", slow)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=running.InTime, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def read_until(sock: socket.socket, end: bytes) -> None:
    answer = b""
    while not answer.endswith(end):
        answer += (received := sock.recv(4096))
        assert received, answer


def test_a_connection_without_a_request_is_closed_in_time_and_a_slow_answer_is_not(hurried):
    def connect(sent: bytes) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", hurried), timeout=5)
        sock.sendall(sent)
        return sock

    start = time.monotonic()
    silent = [connect(sent) for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nA")]
    slow, kept = connect(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"), connect(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    read_until(kept, b"here")
    time.sleep(0.3)
    kept.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")  # within the time from the answer before
    read_until(kept, b"here")
    for sock in silent:
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass
    assert time.monotonic() - start < 1.4
    read_until(slow, b"at last")


# Pictures and processes


def png(*size: int, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 7).save(file, "PNG", **options)
    return file.getvalue()


def endless_gif() -> bytes:
    """A GIF whose comment Pillow joins in a time that grows with the square of its length."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "GIF")
    gif = file.getvalue()
    at = 13 + 3 * 2 ** ((gif[10] & 7) + 1)  # behind the colours
    return gif[:at] + b"\x21\xfe" + (b"\xff" + b"c" * 255) * 100_000 + b"\0" + gif[at:]


@pytest.fixture(scope="module")
def decoder():
    decoder = PictureDecoder(ImagePolicy(), seconds=0.5, memory=200 * 2**20, workers=1)
    yield decoder
    decoder.close()


def squares(decoder, *sources, size=24):
    return asyncio.run(decoder.squares(sources, size))


@pytest.mark.parametrize("name", ["colour", "reading", "caption"])
def test_a_picture_opened_in_a_process_is_the_one_opened_here(decoder, name):
    data = (Path(serve.__file__).with_name("records") / f"{name}.png").read_bytes()
    assert squares(decoder, data)[0].tobytes() == square(open_image(data, ImagePolicy()), 24).tobytes()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"GIF89a", "cannot be read|no picture"),
        ("/etc/passwd", "data URLs"),
        ("http://a.example/a.png", "not fetched"),
        (png(8000, 8000, mode="1"), "more than the 50,000,000"),
    ],
)
def test_a_picture_that_is_refused_in_a_process_is_refused_in_the_same_sentence(decoder, source, says):
    with pytest.raises(ValueError, match=says):
        squares(decoder, source)


@pytest.mark.parametrize("source", [png(1, 49_000_000, mode="1"), endless_gif()], ids=["memory", "time"])
def test_a_picture_that_takes_too_much_ends_its_process_and_the_next_one_is_opened(decoder, source):
    squares(decoder, png(9, 9))
    before, start = decoder.processes.processes[0].child, time.monotonic()
    with pytest.raises(ValueError, match="more than 0.5 seconds or 200 MiB"):
        squares(decoder, source)
    assert time.monotonic() - start < 5 and before.poll() is not None
    assert squares(decoder, png(9, 9))[0].size == (24, 24)


def test_pictures_that_nobody_waits_for_are_dropped(decoder):
    gif = endless_gif()

    async def vanish():
        tasks = [asyncio.create_task(decoder.squares([gif], 24)) for _ in range(20)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        start = time.monotonic()
        await decoder.squares([png(9, 9)], 24)
        return time.monotonic() - start

    assert asyncio.run(vanish()) < 5  # one was under way; all would take ten seconds


def test_addresses_are_fetched_here_and_opened_there():
    fetched = []

    def fetch(url, max_bytes):
        fetched.append((url, max_bytes))
        return png(9, 9)

    decoder = PictureDecoder(ImagePolicy(fetch=fetch), workers=1)
    try:
        assert squares(decoder, "http://a.example/a.png", "HTTPS://b.example")[1].size == (24, 24)
    finally:
        decoder.close()
    assert fetched == [("http://a.example/a.png", 2**25), ("HTTPS://b.example", 2**25)]


def test_redirects_are_followed_to_allowed_hosts_and_slow_hosts_hold_up_no_other_picture(monkeypatch):
    internet = Internet(monkeypatch)
    decoder = PictureDecoder(TO_HOST, workers=1)

    async def beside_slow_ones():
        slow = [asyncio.create_task(decoder.squares([f"http://{HOST}/drip"], 24)) for _ in range(20)]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await decoder.squares([data_url(png(9, 9))], 24)
        seconds = time.monotonic() - start
        for task in slow:
            task.cancel()
        return seconds

    try:
        internet.server.location = f"http://{HOST}/a.png"
        assert squares(decoder, f"http://{HOST}/redirect")[0].size == (24, 24)
        for target in REDIRECTS.values():
            internet.server.location = target.format(inside=internet.inside, quoted="%2F")
            with pytest.raises(ValueError, match="ictures|picture|address"):
                squares(decoder, f"http://{HOST}/redirect")
        assert not any("secret" in hit for hit in internet.server.hits)
        assert asyncio.run(beside_slow_ones()) < 0.8  # a slow one ends after a second
    finally:
        decoder.close()


def test_a_process_that_decodes_imports_no_torch_and_ends_with_the_server():
    program = f"import sys; sys.path.insert(0, {str(WORKER.parent)!r}); import decoding_worker; print([*sys.modules])"
    found = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'PIL.Image'" in found
    assert not {name for name in ("torch", "transformers", "processing_mmgpt") if f"'{name}'" in found}
    worker = subprocess.Popen([sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pickle.dump(({}, 1.0, 2**30), worker.stdin)
    worker.communicate(timeout=20)
    assert worker.returncode == 0


# Rendering


def test_conversations_rendered_at_the_same_time_are_those_rendered_alone(processor):
    def chat(number: int) -> list[dict]:
        pair = [{"role": "user", "content": f"</s>{number}"}, {"role": "assistant", "content": "<image>" * number}]
        return pair * (1 + number % 7 * 10) + [{"role": "user", "content": "and?"}]

    alone = [processor.encode_chat(chat(number), add_generation_prompt=True) for number in range(24)]
    with ThreadPoolExecutor(8) as threads:
        together = [*threads.map(lambda n: processor.encode_chat(chat(n), add_generation_prompt=True), range(24))]
    assert together == alone


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": "a" * 17 * 100}], "1,700 characters"),
        ([{"role": "user", "content": "a"}] * 26, "26 messages"),
        ([{"role": "user", "content": "a b " * 100}], "tokens"),
    ],
)
def test_what_there_is_no_room_for_is_refused_before_it_costs_anything(processor, messages, says):
    with pytest.raises(ValueError, match=says):
        render(messages, processor, 100)


# Replies


async def letters(text: str):
    for letter in text:
        yield letter


@pytest.mark.parametrize("seed", range(50))
def test_a_reply_ends_before_its_first_stop_sequence(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("abc", k=rng.randrange(30)))
    stops = ["".join(rng.choices("abc", k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]

    async def collect():
        return [piece async for piece in until_stop(letters(text), stops, 30)]

    *pieces, (last, tokens, end) = asyncio.run(collect())
    seen = next((n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), len(text))
    assert "".join(piece for piece, _, _ in pieces) + last == text[: find_first(text[:seen], stops)]
    assert (tokens, end) == (seen, "stop")


def test_a_reply_that_is_cut_short_says_so():
    async def collect(text):
        return [piece async for piece in until_stop(letters(text), ["!"], 4)][-1]

    assert asyncio.run(collect("abcd")) == ("", 4, "length")
    assert asyncio.run(collect("abc!")) == ("", 4, "stop") and asyncio.run(collect("abc")) == ("", 3, "stop")


def test_replies_that_nobody_waits_for_are_not_begun_or_end_at_the_next_token(make_model, processor):
    model, steps = make_model(), []
    model.register_forward_hook(lambda *args: steps.append(1))
    ids = processor.encode_chat([{"role": "user", "content": "hello"}], add_generation_prompt=True).input_ids
    thread = ThreadPoolExecutor(1)

    async def read(pieces):
        texts = write(thread, model, processor, ids, [], max_new_tokens=2000, do_sample=False)
        async for _ in texts:
            pieces -= 1
            if not pieces:
                break
        await texts.aclose()

    async def vanish():
        waiting = [asyncio.create_task(read(2000)) for _ in range(20)]
        await read(3)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(vanish())
    thread.submit(lambda: None).result()
    assert 3 <= len(steps) < 1000


# What a request may say


def body(**fields) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()


MANY = 300_000
HOSTILE = {
    "elements": (b'{"messages":[' + b"0," * MANY + b"0]}", "elements"),
    "lists": (b'{"messages":' + b"[" * MANY + b"]" * MANY + b"}", "elements"),
    "objects": (b'{"messages":[' + b"{}," * MANY + b"0]}", "elements"),
    "fields": (b"{" + b",".join(b'"k%d":0' % number for number in range(MANY)) + b"}", "elements"),
    "strings": (b'{"messages":' + b'""' * MANY + b"}", "elements"),
    "messages": (body(messages=[{"role": "user", "content": "a"}] * 1001), "messages"),
    "parts": (body(messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 65}]), "content"),
    "pictures": (
        body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}] * 17}]),
        "16",
    ),
    "digits": (b'{"n":' + b"1" * MANY + b"}", "number"),
    "a long field": (b'{"' + b"k" * MANY + b'":0}', "messages"),
    "half a character": (body(model="\ud800"), "escape"),
    "stop 0": (body(stop=0), "stop"),
    "stop false": (body(stop=False), "stop"),
    "n true": (body(n=True), "n: "),
    "n 1.0": (body(n=1.0), "n: "),
    "penalty false": (body(frequency_penalty=False), "frequency_penalty"),
    "a cold temperature": (body(temperature=1e-38), "temperature"),
    "a temperature as text": (body(temperature="1"), "temperature"),
    "temperature true": (body(temperature=True), "temperature"),
    "top_p true": (body(top_p=True), "top_p"),
    "max_tokens 1.0": (body(max_tokens=1.0), "max_tokens"),
    "stream 1": (body(stream=1), "stream"),
    "model 5": (body(model=5), "model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_request_that_says_too_much_or_another_thing_is_refused_in_a_short_sentence(name):
    sent, says = HOSTILE[name]
    with pytest.raises(ValueError, match=says) as caught:
        serve.read_chat(sent)
    assert len(str(caught.value)) <= 500


def test_texts_may_hold_whatever_they_like():
    text = '[{,"\\' * 100_000
    assert serve.read_chat(body(messages=[{"role": "user", "content": text}])).messages[0].content == text
    assert count_elements(body(user=text)) == count_elements(body(user=""))
    chat = serve.read_chat(body(temperature=0, n=1, stop="a", top_p=1, frequency_penalty=0.0))
    assert (chat.temperature, chat.stop) == (0, "a") and serve.read_chat(body(stop=None)).stop is None
