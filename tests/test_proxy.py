"""Several servers behind HAProxy, by the configuration that docs/serving.md shows."""

import asyncio
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from conftest import BASE, note_results
from test_many import chats
from test_serving import CHATS, ROOT, adapter, serving  # noqa: F401


pytestmark = [
    pytest.mark.bars,
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed (apt-get install haproxy)"),
]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def proxied(folder: Path, servers: list[str]):
    """Run the proxy of the docs before servers, in the order in which the docs name theirs; gives its address."""
    page = (ROOT / "docs" / "serving.md").read_text()
    config = next(block for block in page.split("```\n") if "balance leastconn" in block)
    for place, url in enumerate(servers):
        config = config.replace(f"127.0.0.1:800{place}", url.removeprefix("http://"))
    port = free_port()
    (folder / "haproxy.cfg").write_text(config.replace("127.0.0.1:8080", f"127.0.0.1:{port}"))
    process = subprocess.Popen(["haproxy", "-f", str(folder / "haproxy.cfg")], stderr=(folder / "proxy").open("wb"))
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


async def streamed(client: httpx.AsyncClient, body: dict, path: str = "") -> tuple[str, list[float]]:
    """A reply, and when its pieces came."""
    text, times = "", []
    async with client.stream("POST", f"{path}/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and (piece := json.loads(line[6:])["choices"][0]["delta"].get("content")):
                text += piece
                times.append(time.monotonic())
    return text, times


def counted(url: str) -> float:
    """Tokens that a server has written."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("mmgpt_tokens_total")))


def test_two_servers_share_chats_and_a_third_is_chosen_by_its_path(adapter, tmp_path):  # noqa: F811
    async def ask(bodies, url, path=""):
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
            return await asyncio.gather(*(streamed(client, body, path) for body in bodies))

    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(serving(model, tmp_path / f"{name}.log"))
            for name, model in (("first", BASE), ("second", BASE), ("other", adapter))
        ]
        urls = [url for url, _ in started]
        proxy = stack.enter_context(proxied(tmp_path, urls))
        bodies = chats(0, 16, 40)
        expected = [text for text, _ in asyncio.run(ask(bodies, urls[0]))]
        before = [counted(url) for url in urls]
        start = time.monotonic()
        found = asyncio.run(ask(bodies, proxy))
        seconds = time.monotonic() - start
        tokens = [counted(url) - already for url, already in zip(urls, before, strict=True)]
        spread = [times[-1] - times[0] for _, times in found]

        body = {"messages": CHATS["text"], "model": "adapter", "max_tokens": 24}
        other, same = asyncio.run(ask([body], proxy, "/other")), asyncio.run(ask([body], urls[2]))
        wrong = httpx.post(f"{proxy}/v1/chat/completions", json=body, trust_env=False)

        started[0][1].terminate()
        started[0][1].wait(20)
        time.sleep(5)  # two looks at its health
        later = asyncio.run(ask(bodies, proxy))
    figures = {"chats": 16, "equal": sum(text == e for (text, _), e in zip(found, expected, strict=True))}
    figures |= {"equal after one server has gone": sum(t == e for (t, _), e in zip(later, expected, strict=True))}
    figures |= {"tokens of each server": tokens, "seconds": round(seconds, 2)}
    note_results("proxy", figures | {"median seconds from first to last piece": round(statistics.median(spread), 2)})
    assert figures["equal"] == figures["equal after one server has gone"] == 16
    assert min(tokens[:2]) > 0.3 * sum(tokens) and tokens[2] == 0
    assert statistics.median(spread) > 0.1 * seconds  # pieces come as they are written
    assert other[0][0] == same[0][0] and wrong.status_code == 400
