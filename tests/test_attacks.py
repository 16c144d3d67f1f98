"""What was tried to stop the servers for everybody: each attack runs beside honest chats, which must not notice.

Hostile clients are processes of their own, four connections each. The guards' own tests are in test_guards.py.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import chat_app
import httpx
import psutil
import pytest
from test_chat import serve
from test_serving import BASE, CHATS, note, picture_part, post, serving, text_part, user


pytestmark = pytest.mark.bars
SECONDS = float(os.environ.get("MMGPT_ATTACK_SECONDS", "20"))  # of each attack
SOAK_SECONDS = float(os.environ.get("MMGPT_SOAK_SECONDS", "600"))
COMMAND = "pytest -n 0 -m bars tests/test_attacks.py"
IS_STILL = 3, 10  # times the idle median that the median may take, and the slowest where that is over SLOWEST
SLOWEST = 3.0  # seconds

# Makes pictures that take a decoder for ever.
MADE = r"""
import io, sys
from PIL import Image

def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()

def many_scans():
    jpeg = saved(Image.new("L", (7000, 7000)), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * 12_000 + jpeg[-2:]

def long_comment():
    gif = saved(Image.new("L", (8, 8)), "GIF")
    at = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    return gif[:at] + b"\x21\xfe" + (b"\xff" + b"c" * 255) * 40_000 + b"\0" + gif[at:]

"""

# Runs one attack until it is ended: `attack.py URL NAME`, with its payloads made at the start.
HOSTILE = (
    MADE
    + r"""
import base64, http.client, json, os, random, socket, threading, time

host, port = sys.argv[1].removeprefix("http://").split(":")
name = sys.argv[2]

def data_url(data, kind="png"):
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()

def shown(url):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 4}).encode()

def thin():
    return saved(Image.new("L", (1, 49_000_000)), "PNG")

def largest():
    return saved(Image.new("RGB", (7071, 7071), (9, 99, 200)), "PNG")

def turns(pairs):
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": pair * pairs + [{"role": "user", "content": "a"}]}).encode()

def say(content="circle:", **fields):
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()

def post(body, wait=True):
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    if wait:
        connection.getresponse().read()
    connection.close()

def abandon(body):
    def one():
        post(body, wait=False)
        time.sleep(0.2)
    return one

def hold(start, count):
    "Open connections that say so much and then nothing; as many again when they are closed."
    sockets = []
    def one():
        while len(sockets) < count:
            sockets.append(socket.create_connection((host, int(port))))
            sockets[-1].sendall(start)
        time.sleep(0.2)
        for sock in sockets[:]:
            sock.setblocking(False)
            try:
                if not sock.recv(4096):
                    sockets.remove(sock)
            except BlockingIOError:
                pass
            except OSError:
                sockets.remove(sock)
    return one

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
ATTACKS = {
    "3 wrong elements": lambda: [lambda b=b'{"messages":[' + b"0," * 3_000_000 + b"0]}": post(b)],
    "3 wrong fields": lambda: [lambda b=b"{" + b",".join(b'"k%d":0' % n for n in range(500_000)) + b"}": post(b)],
    "4a empty scans": lambda: [lambda b=shown(data_url(many_scans(), "jpeg")): post(b)],
    "4b long comment": lambda: [lambda b=shown(data_url(long_comment(), "gif")): post(b)],
    "4c many turns": lambda: [lambda b=turns(8000): post(b), lambda b=turns(499): post(b)],
    "4c control tokens in text": lambda: [lambda b=say(content="</s>a" * 3000): post(b)],
    "5 abandoned": lambda: [abandon(say(max_tokens=500))],
    "6 silent": lambda: [hold(b"", 100)],
    "6 half a head": lambda: [hold(HEAD % 9, 100)],
    "6 half a body": lambda: [hold(HEAD % 2_000_000 + b"\r\n" + b" " * 1_900_000, 60)],
    "7 thin": lambda: [lambda b=shown(data_url(thin())): post(b)],
    "7 largest": lambda: [lambda b=json.dumps({"messages": [{"role": "user", "content": [
        *[{"type": "image_url", "image_url": {"url": data_url(largest())}}] * 16, {"type": "text", "text": "a"}]}],
        "max_tokens": 4}).encode(): post(b)],
    "10 long chats": lambda: [lambda b=turns(1500): post(b), lambda b=turns(40): post(b)],
    "11 cold": lambda: [lambda b=say(temperature=1e-38, stream=stream): post(b) for stream in (False, True)],
}
calls = ATTACKS[name]()
os.nice(15)  # in earnest they would be on other machines
print("ready", flush=True)

def forever(seed):
    rng = random.Random(seed)
    while True:
        try:
            rng.choice(calls)()
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)

for seed in range(int(sys.argv[3])):
    threading.Thread(target=forever, args=(seed,), daemon=True).start()
while sys.stdin.read(1):
    pass
"""
)
NAMES = [
    "3 wrong elements",
    "3 wrong fields",
    "4a empty scans",
    "4b long comment",
    "4c many turns",
    "4c control tokens in text",
    "5 abandoned",
    "6 silent",
    "6 half a head",
    "6 half a body",
    "7 thin",
    "7 largest",
    "10 long chats",
    "11 cold",
]


@contextlib.contextmanager
def attacked(url: str, name: str, connections: int = 4):
    """A hostile client at work."""
    command = [sys.executable, "-c", HOSTILE, url, name, str(connections)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        yield
        process.kill()


def held(process: subprocess.Popen) -> float:
    """MiB of the server and its children."""
    total = 0
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_full_info().pss
    return total / 2**20


HONEST = {"messages": CHATS["text"], "max_tokens": 16}


def chat_for(url: str, process: subprocess.Popen, seconds: float, text: str | None) -> tuple[list[float], float, str]:
    """Honest chats one after the other; their seconds, the most memory between them, and what they were told."""
    took, memory, end = [], 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        status, answer = post(url, HONEST, timeout=120)
        took.append(time.monotonic() - start)
        assert status == 200, answer
        said = json.loads(answer)["choices"][0]["message"]["content"]
        assert text in (None, said)
        text, memory = said, max(memory, held(process))
        time.sleep(0.05)
    return took, memory, text


def test_no_attack_is_noticed_by_honest_text_chats(tmp_path):
    figures, broken = {}, []
    with serving(BASE, tmp_path / "log") as (url, process):
        post(url, {"messages": CHATS["picture"], "max_tokens": 1})
        for name in NAMES:
            idle, idle_memory, text = chat_for(url, process, SECONDS / 4, None)
            with attacked(url, name):
                time.sleep(1)
                took, memory, _ = chat_for(url, process, SECONDS, text)
            times = statistics.median(took) / statistics.median(idle)
            figures[name] = {
                "chats": len(took),
                "median_times_idle": round(times, 2),
                "slowest_seconds": round(max(took), 2),
                "memory_mib": round(memory),
            }
            print(name, figures[name], flush=True)
            if times > IS_STILL[0] or max(took) > max(SLOWEST, IS_STILL[1] * statistics.median(idle)):
                broken.append((name, "slow", figures[name]))
            if memory > 2 * idle_memory + 512:
                broken.append((name, "memory", figures[name]))
        status, answer = post(url, {"messages": CHATS["picture"], "max_tokens": 4}, timeout=120)
        assert status == 200, answer
    idle = {"idle_median_seconds": round(statistics.median(idle), 3), "idle_memory_mib": round(idle_memory)}
    note("attacks", {"attacks": figures, "seconds_of_each": SECONDS, **idle}, COMMAND)
    assert not broken


def asked(page: httpx.Client, event: str, *data) -> str:
    """What the chat app answers, as its page asks: the events of one reply."""
    call = page.post(f"/call/{event}", json={"data": data}).raise_for_status()
    return page.get(f"/call/{event}/{call.json()['event_id']}").raise_for_status().text


def test_no_picture_stops_the_chat_app_for_others(tmp_path):
    prints = f"{MADE}sys.stdout.buffer.write(%s())"
    scans, comment = (
        subprocess.check_output([sys.executable, "-c", prints % made]) for made in ("many_scans", "long_comment")
    )
    settings = chat_app.NO_ADAPTER, 8, 0, 1
    history = [chat_app.said("user", "circle:")]
    times, stopped = {"idle": [], "attacked": []}, threading.Event()

    def hostile(number: int) -> None:
        with httpx.Client(base_url=f"{url}/gradio_api", timeout=None, trust_env=False) as page:
            while not stopped.is_set():
                name, data = [("a.jpg", scans), ("a.gif", comment)][number % 2]
                (path,) = page.post("/upload", files={"files": (name, data)}).json()
                file = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
                answer = asked(page, "reply_to_question", [], {"text": "a", "files": [file]}, *settings)
                assert "event: error" in answer

    with serve(tmp_path) as url, ThreadPoolExecutor(4) as threads:
        with httpx.Client(base_url=f"{url}/gradio_api", timeout=None, trust_env=False) as page:
            for when in times:
                attacks = [threads.submit(hostile, number) for number in range(4)] if when == "attacked" else []
                time.sleep(2 * len(attacks) / 4)
                end = time.monotonic() + SECONDS
                while time.monotonic() < end:
                    start = time.monotonic()
                    assert "event: complete" in asked(page, "reply", history, *settings)
                    times[when].append(time.monotonic() - start)
            stopped.set()
            assert [attack.result() for attack in attacks] == [None] * 4
    figures = {f"{when}_median_seconds": round(statistics.median(of), 3) for when, of in times.items()}
    figures |= {"slowest_seconds": round(max(times["attacked"]), 2), "seconds_of_each": SECONDS}
    note("attacks_chat_app", figures, COMMAND)
    assert statistics.median(times["attacked"]) < IS_STILL[0] * statistics.median(times["idle"])
    assert max(times["attacked"]) < max(SLOWEST, IS_STILL[1] * statistics.median(times["idle"]))


def test_a_signal_ends_the_server_beside_half_sent_bodies_and_abandoned_replies(tmp_path):
    with serving(BASE, tmp_path / "log") as (url, process):
        with contextlib.ExitStack() as stack:
            for name in ("6 half a body", "6 silent", "5 abandoned", "4a empty scans"):
                stack.enter_context(attacked(url, name))
            time.sleep(3)
            children = psutil.Process(process.pid).children(recursive=True)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            _, alive = psutil.wait_procs(children, 10)
            seconds = time.monotonic() - start
    note("attacks_shutdown", {"seconds_to_end": round(seconds, 1), "children_alive": len(alive)}, COMMAND)
    assert seconds < 10 and not alive


# Chats at random until the time is over: `clients.py URL PLAN`.
CLIENTS = r"""
import asyncio, json, random, sys, time
import httpx

plan = json.load(open(sys.argv[2]))
counts = {"finished": 0, "vanished": 0, "wrong": 0, "refused": 0, "slowest_seconds": 0.0}
end = time.monotonic() + plan["seconds"]

async def told(client, body, stream):
    if not stream:
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return answer.status_code
        return answer.json()["choices"][0]["message"]["content"]
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            return answer.status_code
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return text

async def chat(number):
    rng = random.Random(number)
    vanishes = number < plan["vanishing"]
    async with httpx.AsyncClient(base_url=sys.argv[1], timeout=300, trust_env=False) as client:
        while time.monotonic() < end:
            case, start = rng.choice(plan["cases"]), time.monotonic()
            call = told(client, case["body"], rng.random() < 0.5)
            try:
                text = await asyncio.wait_for(call, rng.uniform(0.05, 3) if vanishes else None)
            except TimeoutError:
                counts["vanished"] += 1
                continue
            counts["finished"] += 1
            counts["refused"] += isinstance(text, int)
            counts["wrong"] += isinstance(text, str) and text != case["text"]
            if not vanishes:
                counts["slowest_seconds"] = max(counts["slowest_seconds"], round(time.monotonic() - start, 1))

async def main():
    await asyncio.gather(*map(chat, range(plan["clients"])))

asyncio.run(main())
print(json.dumps(counts))
"""


def test_forty_clients_of_which_a_quarter_is_hostile_and_a_quarter_vanishes(tmp_path):
    rng = random.Random(0)
    words = "circle square star heart red blue plane barn carrot".split()
    cases = [[user(f"{rng.choice(words)} {rng.choice(words)} {number}:")] for number in range(20)]
    cases += [[user(picture_part(), text_part(f"What is {rng.choice(words)}?"))] for _ in range(15)] + [CHATS["turns"]]
    bodies = [{"messages": messages, "max_tokens": 24} for messages in cases]
    hostile = [name for name in NAMES if name != "5 abandoned"]  # those vanish
    with serving(BASE, tmp_path / "log") as (url, process):
        alone = [json.loads(post(url, body)[1])["choices"][0]["message"]["content"] for body in bodies]
        plan = {"cases": [{"body": b, "text": t} for b, t in zip(bodies, alone, strict=True)], "clients": 30}
        (tmp_path / "plan").write_text(json.dumps({**plan, "vanishing": 10, "seconds": SOAK_SECONDS}))
        command = [sys.executable, "-c", CLIENTS, url, str(tmp_path / "plan")]
        client = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        memory, start = [], time.monotonic()
        for name in itertools.cycle(hostile):  # ten hostile connections: four of each of two, and two beside
            with attacked(url, name), attacked(url, rng.choice(hostile)), attacked(url, "5 abandoned", connections=2):
                until = min(time.monotonic() + 20, start + SOAK_SECONDS)
                while time.monotonic() < until and client.poll() is None:
                    memory.append(held(process))
                    time.sleep(2)
            if client.poll() is not None or time.monotonic() - start > SOAK_SECONDS:
                break
        printed, errors = client.communicate(timeout=300)
        assert client.returncode == 0, errors
        again = [json.loads(post(url, body)[1])["choices"][0]["message"]["content"] for body in bodies]
    counts, quarter = json.loads(printed), len(memory) // 4
    before, after = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    figures = {"seconds": SOAK_SECONDS, "clients": 40, "hostile": 10, "vanishing": 10, **counts}
    figures["engine"] = "many at once"
    figures |= {"memory_mib_second_quarter": round(before), "memory_mib_last_quarter": round(after)}
    note("attacks_soak", figures | {"memory_mib_most": round(max(memory))}, COMMAND)
    assert counts["wrong"] == counts["refused"] == 0 and counts["finished"] > 50 and counts["vanished"] > 20
    assert again == alone and after < 1.1 * before
