"""Chat with a model about pictures, in the browser.

    python examples/chat_app.py                                      # the tiny base
    python examples/chat_app.py outputs/quickstart/adapter           # an adapter, on its base
    python examples/chat_app.py BASE --adapter ONE --adapter TWO     # choose between adapters while chatting

Needs `pip install -e ".[demo]" -c constraints.txt`; opens http://127.0.0.1:7860, for this machine only. Pictures can
come with any turn, several with one. `docs/chat.md` tells who sees what and which files are stored.

gradio's own `ChatInterface` is not used: it keeps a question and its pictures in one message, and gradio 6.31 removes
the pictures when such a message is edited. Here each picture is a message of its own, and the text another.
"""

import argparse
import asyncio
import copy
import mimetypes
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path

import gradio as gr
import httpx
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from processing_mmgpt.image_files_mmgpt import OWN_IMAGES
from processing_mmgpt.serving.callers import callers
from processing_mmgpt.serving.pictures import PictureDecoder
from processing_mmgpt.serving.rendering import render, room
from processing_mmgpt.serving.replies import write


BASE = Path(__file__).with_name("tiny_world") / "base"
RECORDS = Path(__file__).with_name("records")
EXAMPLES = [
    {"text": "What colour is the square?", "files": [str(RECORDS / "colour.png")]},
    {"text": "Describe the picture.", "files": [str(RECORDS / "caption.png")]},
    {"text": "What does the text say?", "files": [str(RECORDS / "reading.png")]},
    {"text": "What is 12 plus 30?", "files": []},
]
NO_ADAPTER = "none"
NO_SHARING = ".icon-button-wrapper:has(> button[aria-label=Share]) { display: none !important; }"
MAX_BODY = 24 * 2**20  # bytes of a request: an upload of 20 MB with what is around it
UPLOADS = (600, 86_400)  # every ten minutes, delete the uploads that are older than a day

# Pictures are opened in processes of their own: strangers' ones, for whoever reaches the page.
PICTURES = PictureDecoder(OWN_IMAGES)

# One reply at a time: an adapter is chosen for the whole model, and has to stay until the reply is written. One thread
# holds even after a stop, when the chat has moved on and the model is still at its last token.
WRITER = ThreadPoolExecutor(max_workers=1)


def to_messages(history: list[dict]) -> list[dict]:
    """The messages up to the last question, from gradio's history.

    A reply to it is left out.
    """
    roles = [message["role"] for message in history]
    asked = len(roles) - roles[::-1].index("user") if "user" in roles else 0
    return [{"role": m["role"], "content": [_part(part) for part in m["content"]]} for m in history[:asked]]


def said(role: str, text: str) -> dict:
    """A message of text in gradio's form; a plain string would lose its indentation."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def pictured(path: str) -> dict:
    """A question's picture in gradio's form; without its type the page would offer it as a file to fetch."""
    kind = {"mime_type": mimetypes.guess_type(path)[0], "meta": {"_type": "gradio.FileData"}}
    file = {"path": path, "orig_name": Path(path).name, **kind}
    return {"role": "user", "content": [{"type": "file", "file": file}]}


def _part(part: dict) -> dict:
    if part["type"] == "file":
        return {"type": "image", "path": part["file"]["path"]}
    return {"type": "text", "text": part["text"]}


def ask(history: list[dict], question: dict) -> list[dict]:
    """Add a question after checking its pictures: a bad one would break every later turn.

    Args:
        history: The conversation so far.
        question: `text` and `files`, the paths of its pictures.

    Returns:
        The conversation with the question.
    """
    for path in map(Path, question["files"]):
        try:
            PICTURES.check(path.read_bytes())
        except (OSError, ValueError) as error:
            raise gr.Error(f"{path.name}: {error}") from error
    if not question["text"].strip():
        raise gr.Error("A question needs a text beside its pictures.")
    return [*history, *map(pictured, question["files"]), said("user", question["text"])]


def edit(history: list[dict], edited: gr.EditData) -> list[dict]:
    """Replace the text of a question and drop what follows it; its pictures, which are before it, stay."""
    return [*history[: edited.index], said("user", edited.value)]


def choose_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Switch to one of the adapters that were loaded, or to the bare model."""
    # By PEFT itself: transformers 5.24 refuses its own methods for it under every PEFT before 0.22.
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(adapter != NO_ADAPTER)
    if adapter != NO_ADAPTER:
        set_adapter(model, adapter, inference_mode=True)


def adapters(model: PreTrainedModel) -> list[str]:
    """Names of the adapters that were loaded."""
    return list(getattr(model, "peft_config", {}))


async def stream(
    model: PreTrainedModel, processor: ProcessorMixin, messages: list[dict], adapter: str, **options
) -> AsyncIterator[str]:
    """Yield the reply, as far as it is written; closing this generator stops the model at its next token.

    Args:
        model: The model, with its adapters.
        processor: Its processor.
        messages: A conversation that ends with a question.
        adapter: One of [`adapters`], or `NO_ADAPTER`.
        **options: For `generate`.
    """
    input_ids, sources = await asyncio.to_thread(render, messages, processor, room(model, processor))
    pictures = await PICTURES.squares(sources, processor.image_processor.size)
    adapted = partial(choose_adapter, model, adapter)
    reply = ""
    async with aclosing(write(WRITER, model, processor, input_ids, pictures, before=adapted, **options)) as texts:
        async for text in texts:
            reply += text
            if text:
                yield reply


def join_events(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chat: gr.Chatbot,
    box: gr.MultimodalTextbox,
    stop: gr.Button,
    settings: list[gr.components.Component],
) -> None:
    """Connect each way of asking: a question in the box, an example, an edited question, a retry."""

    async def reply(history: list[dict], adapter: str, max_new_tokens: int, temperature: float, top_p: float):
        messages = to_messages(history)
        asked = history[: len(messages)]
        yield asked
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **sampling}
        try:
            async for text in stream(model, processor, messages, adapter, **options):
                yield [*asked, said("assistant", text)]
        except (OSError, ValueError) as error:
            raise gr.Error(str(error)) from error

    async def reply_to_question(history: list[dict], question: dict, *settings):
        emptied = {"text": "", "files": []}
        asked = await asyncio.to_thread(ask, history, question)
        async for conversation in reply(asked, *settings):
            yield conversation, emptied
            emptied = gr.skip()  # once: the next question may be in the box already

    async def reply_to_example(chosen: gr.SelectData, *settings):
        asked = await asyncio.to_thread(ask, [], EXAMPLES[chosen.index])  # only its number is the page's
        async for conversation in reply(asked, *settings):
            yield conversation

    async def reply_to_edited(history: list[dict], edited: gr.EditData, *settings):
        async for conversation in reply(edit(history, edited), *settings):
            yield conversation

    # One event from the question to the end of its reply: chained ones cost the page a round trip more before the
    # first word. No limit, so that a question shows at once while the reply to another person's is written.
    event = {"concurrency_limit": None, "show_progress": "hidden"}
    replies = [
        box.submit(reply_to_question, [chat, box, *settings], [chat, box], **event),
        chat.example_select(reply_to_example, settings, chat, **event),
        chat.edit(reply_to_edited, [chat, *settings], chat, **event),
        chat.retry(reply, [chat, *settings], chat, **event),
    ]
    stop.click(None, cancels=replies)
    # Words that were under way when it was cleared fill it again: so it is cleared once more after them.
    chat.clear(None, cancels=replies).then(lambda: [], None, chat, **event)


def build_app(model: PreTrainedModel, processor: ProcessorMixin) -> gr.Blocks:
    """Lay out the page; a conversation lives in its browser tab and comes with every request."""

    def prompt(history: list[dict]) -> str:
        messages = to_messages(history)
        return processor.apply_chat_template(messages, add_generation_prompt=True) if messages else ""

    choices = [NO_ADAPTER, *adapters(model)]
    with gr.Blocks(title="mmgpt chat", analytics_enabled=False, delete_cache=UPLOADS, fill_height=True) as app:
        # What was said is shown as it was said: a literal `<image>` in it is text, and no markup.
        chat = gr.Chatbot(
            show_label=False,
            scale=1,
            editable="user",
            buttons=["copy"],
            render_markdown=False,
            examples=copy.deepcopy(EXAMPLES),  # gradio writes into them
            allow_file_downloads=False,
            group_consecutive_messages=False,
        )
        box = gr.MultimodalTextbox(
            show_label=False, placeholder="Ask; pictures may come with every question", sources=["upload"],
            file_types=["image"], file_count="multiple", autofocus=True, stop_btn=False,
        )  # fmt: skip
        stop = gr.Button("Stop", size="sm")
        with gr.Accordion("Settings", open=False):
            adapter = gr.Dropdown(choices, value=choices[-1], label="Adapter", interactive=len(choices) > 1)
            length = gr.Slider(1, 512, value=128, step=1, label="Longest reply, in tokens")
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature; 0 takes the likeliest token")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p")
        with gr.Accordion("The exact prompt", open=False):
            show = gr.Button("Show the prompt of the last question", size="sm")
            shown = gr.Textbox(show_label=False, lines=3, max_lines=12, interactive=False, elem_id="prompt")
        join_events(model, processor, chat, box, stop, [adapter, length, temperature, top_p])
        show.click(prompt, chat, shown)
    return app


def load(model: str, adapter_paths: list[str]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model or an adapter with its base, and further adapters under the names of their folders."""
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval()
    for path in adapter_paths:
        loaded.load_adapter(path, adapter_name=Path(path).name)
    return loaded, AutoProcessor.from_pretrained(model)


def warm_up(url: str) -> None:
    """Ask for two tokens about a picture, as a page does, because the first reply of a process takes longer.

    Most of that is gradio's import of matplotlib before its first event. The requests
    are those of https://www.gradio.app/guides/querying-gradio-apps-with-curl.

    Args:
        url: Where the app is served.

    Raises:
        RuntimeError: The app cannot answer.
    """
    with httpx.Client(base_url=f"{url}gradio_api", timeout=None, trust_env=False) as page:  # no proxy in between
        sent = page.post("/upload", files={"files": Path(EXAMPLES[0]["files"][0]).read_bytes()})
        history = [pictured(path) for path in sent.raise_for_status().json()] + [said("user", EXAMPLES[0]["text"])]
        call = page.post("/call/reply", json={"data": [history, NO_ADAPTER, 2, 0, 1]})
        reply = page.get(f"/call/reply/{call.raise_for_status().json()['event_id']}").raise_for_status().text
    if "event: complete" not in reply:
        raise RuntimeError(f"The model cannot answer a first question; what gradio says: {reply!r}")


def main() -> None:
    """Load, serve until Ctrl-C, and delete the uploads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(BASE), help="folder or Hub id of a model or an adapter")
    parser.add_argument("--adapter", action="append", default=[], help="a further adapter; may be given several times")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--allowed-host", action="append", default=[], help="a name by which a proxy calls this page")
    args = parser.parse_args()
    try:
        model, processor = load(args.model, args.adapter)
    except (OSError, ValueError) as error:
        sys.exit(f"The model cannot be loaded: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that an end from outside cleans up as well
    with closing(PICTURES), tempfile.TemporaryDirectory(prefix="mmgpt-chat-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        app = build_app(model, processor)
        # The fonts of gradio's own theme come from another host, and a picture's share button sends it to one.
        theme = gr.themes.Base(font="system-ui", font_mono="monospace")
        app.launch(
            server_name="127.0.0.1", server_port=args.port, share=False, max_file_size="20mb", footer_links=[],
            ssr_mode=False, theme=theme, css=NO_SHARING, prevent_thread_lock=True, quiet=True,
            app_kwargs={"middleware": callers(args.allowed_host), "max_body_size": MAX_BODY},
        )  # fmt: skip
        warm_up(app.local_url)
        print(f"Running on {app.local_url}; Ctrl-C ends it.", flush=True)
        app.block_thread()


if __name__ == "__main__":
    main()
