"""The chat in the terminal, by a child process, and the one in the browser, by a real browser."""

import asyncio
import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import chat_app
import gradio as gr
import peft
import pytest
import torch
from PIL import Image
from tiny_world import evaluation
from transformers import AutoModelForImageTextToText

from modeling_mmgpt.adapters_mmgpt import lora_config


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"
RECORDS = ROOT / "examples" / "records"
RESULTS = Path(__file__).with_name("results") / "chat.json"
QUIET = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


# chat.py


class Terminal:
    """A child process at whose prompt one types."""

    def __init__(self, *command: str | Path, cwd: Path):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=cwd, env=QUIET, text=True, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
        )  # fmt: skip

    def type(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read_until(self, end: str) -> str:
        """What it prints up to `end`, without it."""
        text = ""
        while not text.endswith(end):
            letter = self.process.stdout.read(1)
            assert letter, f"The chat ended after {text!r}."
            text += letter
        return text.removesuffix(end)

    def interrupt(self) -> None:
        """Ctrl-C at the prompt; once more if it fell between the prompt and the reading, where nothing wakes up."""
        self.process.send_signal(signal.SIGINT)
        while not select.select([self.process.stdout], [], [], 10)[0]:
            self.process.send_signal(signal.SIGINT)

    def say(self, line: str) -> str:
        self.type(line)
        return self.read_until("\n> " if not line.startswith("/") else "> ").strip()


def test_the_terminal_chat_takes_pictures_stops_clears_and_saves(tmp_path):
    shutil.copy(RECORDS / "colour.png", tmp_path / "my scene.png")
    terminal = Terminal(ROOT / "examples/chat.py", BASE, "--max-new-tokens", "64", cwd=tmp_path)
    terminal.read_until("> ")
    assert "nowhere.png" in terminal.say("/image nowhere.png")
    assert "/clear" in terminal.say("/wave")
    assert "Nothing" in terminal.say("/save chat.jsonl")
    assert "Which file" in terminal.say("/image")
    assert "1" in terminal.say("/image 'my scene.png'")
    first = terminal.say("square :")
    second = terminal.say("heart :")
    assert first and second
    terminal.type("once more")
    terminal.process.stdout.read(1)  # it writes
    terminal.process.send_signal(signal.SIGINT)
    assert "Stopped" in terminal.read_until("\n> ")
    terminal.interrupt()
    assert "Ctrl-D" in terminal.read_until("\n> ")
    terminal.say("/save chat.jsonl")
    record = json.loads((tmp_path / "chat.jsonl").read_text())
    assert record["images"] == [str(tmp_path / "my scene.png")]
    texts = [message["content"][-1]["text"].strip() for message in record["messages"]]
    assert texts == ["square :", first, "heart :", second]
    assert [len(message["content"]) for message in record["messages"]] == [2, 1, 1, 1]
    terminal.say("/clear")
    assert "Nothing" in terminal.say("/save empty.jsonl") and not (tmp_path / "empty.jsonl").exists()
    terminal.process.stdin.close()
    assert terminal.process.wait(timeout=60) == 0


# chat_app.py, without a browser


def shown(path: str) -> dict:
    """A message with a picture, as gradio hands it over."""
    return {"role": "user", "content": [{"type": "file", "file": {"path": path}}]}


HISTORY = [
    shown("a.png"),
    chat_app.said("user", "What?"),
    chat_app.said("assistant", "red"),
    chat_app.said("user", "Where?"),
    chat_app.said("assistant", "left"),
]


def test_the_prompt_ends_with_the_last_question():
    messages = chat_app.to_messages(HISTORY)
    assert [message["role"] for message in messages] == ["user", "user", "assistant", "user"]
    assert messages[0]["content"] == [{"type": "image", "path": "a.png"}]
    assert messages[1]["content"] == [{"type": "text", "text": "What?"}]
    assert chat_app.to_messages([]) == []


def test_an_edited_question_keeps_its_pictures_and_loses_what_came_after():
    edited = gr.EditData(None, {"index": 1, "previous_value": "What?", "value": "How many?"})
    assert chat_app.edit(HISTORY, edited) == [shown("a.png"), chat_app.said("user", "How many?")]


def test_a_bad_picture_never_gets_into_the_conversation(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(gr.Error, match="torn.png"):
        chat_app.ask([], {"text": "What?", "files": [str(tmp_path / "torn.png")]})
    with pytest.raises(gr.Error, match="text"):
        chat_app.ask([], {"text": " ", "files": []})


async def collect(model, processor, adapter=chat_app.NO_ADAPTER, pieces=None, **options) -> str:
    """The reply, or what was there when it was stopped after so many pieces."""
    messages, texts = [{"role": "user", "content": "hello"}], []
    replies = chat_app.stream(model, processor, messages, adapter, do_sample=False, **options)
    async for text in replies:
        texts.append(text)
        if len(texts) == pieces:
            break
    await replies.aclose()
    return texts[-1]


def test_a_stopped_reply_is_no_longer_computed(make_model, processor):
    model, steps = make_model(), []
    model.register_forward_hook(lambda *args: steps.append(1))
    asyncio.run(collect(model, processor, pieces=2, max_new_tokens=2000))
    chat_app.WRITER.submit(lambda: None).result()  # the thread that wrote is free again
    assert 2 <= len(steps) < 1000


def test_an_error_of_the_model_reaches_the_reader(make_model, processor):
    with pytest.raises(ValueError, match="max_new_tokens"):
        asyncio.run(collect(make_model(), processor, max_new_tokens=0))


def test_two_who_chose_different_adapters_get_each_their_own(make_model, processor):
    model = make_model()
    config = lora_config(model, r=4, lora_alpha=64, init_lora_weights=False)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, name)
    choices = [chat_app.NO_ADAPTER, "one", "two"]
    assert chat_app.adapters(model) == ["one", "two"]
    alone = [asyncio.run(collect(model, processor, name, max_new_tokens=12)) for name in choices]
    assert len(set(alone)) == 3

    async def together():
        return await asyncio.gather(*(collect(model, processor, name, max_new_tokens=12) for name in choices))

    assert asyncio.run(together()) == alone


# chat_app.py in a browser


# The app with a model that takes its time, as large ones do, and comes to no end by itself: the tiny base would have
# written its longest reply before a browser without a core could stop it.
UNHURRIED = """
import time
import chat_app

load = chat_app.load

def load_unhurried(*args):
    model, processor = load(*args)
    model.register_forward_hook(lambda *args: time.sleep(0.1))
    model.generation_config.suppress_tokens.append(processor.tokenizer.eos_token_id)
    return model, processor

chat_app.load = load_unhurried
chat_app.main()
"""


@contextlib.contextmanager
def serve(temporary: Path, *arguments: str | Path, program: tuple[str, ...] = ("examples/chat_app.py",)):
    """The app as a process of its own, its temporary files under `temporary`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *program, BASE, "--port", port, *arguments]
    paths = {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env={**QUIET, **paths}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    printed = ""
    while "Running on" not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def app(browser, tmp_path_factory):
    """The app on the base, with an adapter of random weights; its address and where its uploads lie."""
    adapter, temporary = tmp_path_factory.mktemp("adapters") / "other", tmp_path_factory.mktemp("temporary")
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    torch.manual_seed(0)
    config = lora_config(model, r=4, lora_alpha=64, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    with serve(temporary, "--adapter", adapter) as address:
        yield address, temporary
    assert not list(temporary.glob("mmgpt-chat-*"))  # the uploads are gone


@pytest.fixture(scope="module")
def unhurried_app(browser, tmp_path_factory):
    """The address of the app with a model that writes 10 tokens a second and comes to no end."""
    with serve(tmp_path_factory.mktemp("temporary"), program=("-c", UNHURRIED)) as address:
        yield address


@pytest.fixture
def open_page(browser, request):
    """Open an app, by default `app`, in a session of its own, which may talk to that app alone."""
    contexts, elsewhere = [], []

    def open_page(address: str | None = None):
        address = address or request.getfixturevalue("app")[0]
        contexts.append(browser.new_context(viewport={"width": 900, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: elsewhere.append(request.url) if address not in request.url else None)
        page.goto(address)
        page.get_by_placeholder("Ask;").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []


def attach(page, *pictures: str | Path) -> None:
    page.locator("input[type=file]").first.set_input_files([str(path) for path in pictures])
    page.locator(".thumbnail-item").nth(len(pictures) - 1).wait_for()


def submit(page, question: str, *pictures: str | Path) -> None:
    """Ask, and wait for the first text of the reply."""
    replies = page.get_by_test_id("bot").count()
    if pictures:
        attach(page, *pictures)
    page.get_by_placeholder("Ask;").fill(question)
    page.get_by_label("Submit").click()
    page.wait_for_function(
        "n => { const all = document.querySelectorAll('[data-testid=bot]');"
        " return all.length > n && all[n].innerText.trim() }",
        arg=replies,
    )


def last_reply(page) -> str:
    """The text of the last reply once it is written: as long as it grows, it cannot be tried again."""
    page.wait_for_function(
        "() => { const retry = document.querySelector('[aria-label=Retry]');"
        " const replies = [...document.querySelectorAll('[data-testid=bot]')];"
        " return retry && !retry.disabled && replies.at(-1)?.innerText.trim() }"
    )
    return page.get_by_test_id("bot").last.inner_text()


def choose(page, adapter: str) -> None:
    page.get_by_label("Adapter").click()
    page.get_by_role("option", name=adapter).click()


def set_length(page, tokens: int) -> None:
    if not page.get_by_label("number input for Longest reply").is_visible():
        page.get_by_role("button", name="Settings").click()
    field = page.get_by_label("number input for Longest reply")
    field.fill(str(tokens))
    field.press("Enter")


def prompt(page) -> str:
    show = page.get_by_role("button", name="Show the prompt")
    if not show.is_visible():
        page.get_by_role("button", name="The exact prompt").click()
    before = page.locator("#prompt textarea").input_value()
    show.click()
    page.wait_for_function("b => document.querySelector('#prompt textarea').value !== b", arg=before)
    return page.locator("#prompt textarea").input_value()


def test_ask_about_pictures_in_several_turns_retry_edit_and_clear(open_page, app, tmp_path):
    scene = shutil.copy(RECORDS / "colour.png", tmp_path / "my scene.png")
    page = open_page()
    set_length(page, 8)
    choose(page, "none")
    submit(page, "square :", scene)
    first = last_reply(page)
    submit(page, "heart :")
    last_reply(page)
    submit(page, "circle :", RECORDS / "caption.png", RECORDS / "reading.png")
    third = last_reply(page)
    assert page.locator("[data-testid=user] img").count() == 3
    assert not any(button.is_visible() for button in page.get_by_label("Share").all())
    text = prompt(page)
    assert text.count("<image>") == 3 and text.endswith("### Instruction:\ncircle :\n\n### Response:\n")
    assert f"### Response:\n{first}</s>" in text
    assert list(app[1].glob("mmgpt-chat-*/*/my scene.png"))  # the upload lies where it will be deleted

    set_length(page, 4)
    page.get_by_label("Retry").click()
    page.wait_for_function(
        "was => { const all = [...document.querySelectorAll('[data-testid=bot]')].map(reply => reply.innerText);"
        " return all.length === 3 && all[2].trim() && all[2] !== was }",
        arg=third,
    )
    assert third.startswith(last_reply(page))

    page.get_by_label("Edit").first.click()
    page.locator(".edit-textarea").fill("heart :")
    page.get_by_label("Submit").first.click()  # the other belongs to the next question
    page.wait_for_function("() => document.querySelectorAll('[data-testid=bot]').length === 1")
    last_reply(page)
    assert page.locator("[data-testid=user] img").count() == 1
    text = prompt(page)
    assert text.count("<image>") == 1 and "heart :" in text and "square" not in text

    page.get_by_label("Clear").click()
    page.get_by_text("Describe the picture.").click()  # an example
    page.get_by_test_id("bot").wait_for()
    last_reply(page)
    text = prompt(page)
    assert "Describe the picture." in text and text.count("<image>") == 1 and "heart" not in text


def begin_long(page) -> str:
    """Ask for a reply of 50 s, wait until it has grown, and give its first words."""
    set_length(page, 512)
    submit(page, "square :", RECORDS / "colour.png")
    early = page.get_by_test_id("bot").last.inner_text()
    page.wait_for_function(
        "n => document.querySelector('[data-testid=bot]').innerText.length > n + 10", arg=len(early)
    )
    return early


def settle(page) -> None:
    """Wait until no word that was under way arrives any more: half a second without a change."""
    page.wait_for_function(
        "() => { const now = [...document.querySelectorAll('[data-testid=bot]')].map(r => r.innerText).join();"
        " const same = window.before === now; window.before = now; return same }",
        polling=500,
    )


def test_a_reply_streams_and_stops(open_page, unhurried_app):
    page = open_page(unhurried_app)
    early = begin_long(page)
    page.get_by_role("button", name="Stop").click()
    last_reply(page)
    settle(page)
    stopped = page.get_by_test_id("bot").first.inner_text()
    assert len(early) < len(stopped) and len(stopped.split()) < 200
    set_length(page, 8)
    submit(page, "circle :", RECORDS / "caption.png")
    last_reply(page)
    assert page.get_by_test_id("bot").first.inner_text() == stopped


def test_a_question_asked_too_early_stays_and_a_growing_reply_can_be_cleared(open_page, unhurried_app):
    page = open_page(unhurried_app)
    begin_long(page)
    box = page.get_by_placeholder("Ask;")
    box.fill("heart :")
    box.press("Enter")  # too early: it stays in the box
    page.get_by_role("button", name="Stop").click()
    last_reply(page)
    settle(page)
    assert box.input_value() == "heart :" and page.get_by_test_id("user").count() == 2

    submit(page, "circle :", RECORDS / "caption.png")
    page.get_by_label("Clear").click()
    page.get_by_text("Describe the picture.").wait_for()
    settle(page)
    set_length(page, 8)
    submit(page, "heart :", RECORDS / "reading.png")
    last_reply(page)
    assert page.get_by_test_id("bot").count() == 1 and "circle" not in prompt(page)


def test_two_sessions_see_nothing_of_each_other_and_choose_their_own_adapters(open_page):
    one, two = open_page(), open_page()
    for page in (one, two):
        set_length(page, 8)
    choose(two, "none")
    submit(one, "square :", RECORDS / "colour.png")
    submit(two, "square :", RECORDS / "colour.png")
    assert last_reply(one) != last_reply(two)  # `other` is chosen at first
    submit(one, "only one asks this")
    last_reply(one)
    assert "only one asks this" in one.content() and "only one asks this" not in two.content()
    assert two.get_by_test_id("bot").count() == 1 and "only one" not in prompt(two)


def test_what_is_no_picture_is_refused_in_a_sentence(open_page, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    torn = tmp_path / "torn.png"
    torn.write_bytes((tmp_path / "good.png").read_bytes()[:40])
    page = open_page()
    attach(page, torn)
    page.get_by_placeholder("Ask;").fill("What is it?")
    page.get_by_label("Submit").click()
    page.get_by_text(re.compile("torn.png: .* no picture")).wait_for()
    assert page.get_by_test_id("user").count() == 0
    assert page.get_by_placeholder("Ask;").input_value() == "What is it?"


def test_a_page_of_another_origin_can_neither_upload_nor_reach_the_app_by_its_own_name(app, open_page, foreign_page):
    upload = """async address => {
        const form = new FormData();
        form.append('files', new File(['GIF89a'], 'foreign.gif'));
        await fetch(address + '/gradio_api/upload', {method: 'POST', mode: 'no-cors', body: form});
    }"""
    for page, status in ((foreign_page, 403), (open_page(), 200)):
        with page.expect_response("**/gradio_api/upload") as answer:
            page.evaluate(upload, app[0])
        assert answer.value.status == status
        assert bool(list(app[1].glob("mmgpt-chat-*/*/foreign.gif"))) == (status == 200)
    assert foreign_page.goto(app[0].replace("127.0.0.1", "rebound.example")).status == 400


CLOCK = """() => {
    document.addEventListener('click', event => {
        if (!event.target.closest('[aria-label=Submit]')) return;
        const before = document.querySelectorAll('[data-testid=bot]').length, start = performance.now();
        window.seconds = new Promise(resolve => new MutationObserver(() => {
            const replies = document.querySelectorAll('[data-testid=bot]');
            if (replies[before]?.innerText.trim()) resolve((performance.now() - start) / 1000);
        }).observe(document.body, {childList: true, subtree: true, characterData: true}));
    }, true);
}"""


@pytest.mark.bars
def test_note_the_time_from_the_click_to_the_first_text(browser, tmp_path):
    asked = {
        "first_of_the_app_with_a_picture": ["square :", RECORDS / "colour.png"],
        "later": ["heart :"],
        "later_with_a_picture": ["circle :", RECORDS / "caption.png"],
        "first_of_another_page": ["square :"],
    }
    seconds = {turn: [] for turn in asked}
    for _ in range(5):
        with serve(tmp_path) as address:
            for turn, question in asked.items():
                if turn.startswith("first"):
                    page = browser.new_page()
                    page.goto(address)
                    set_length(page, 8)
                    page.evaluate(CLOCK)
                submit(page, *question)
                seconds[turn].append(page.evaluate("window.seconds"))
                last_reply(page)
    figures = {turn: {"median": statistics.median(of), "least": min(of)} for turn, of in seconds.items()}
    noted = {"seconds_from_click_to_first_text": figures, "times_measured": 5}
    noted |= evaluation.measured_with("pytest -n 0 -m bars tests/test_chat.py")
    RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")
