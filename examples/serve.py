"""Serve a model to clients of OpenAI's chat API.

    pip install -e ".[serve]" -c constraints.txt
    python examples/serve.py outputs/quickstart/adapter --port 8000

The model is a folder or a Hub id, of an adapter or of a whole model; it is served under the name of its folder or its
id. Pictures come as data URLs; addresses are fetched only from hosts named by `--image-host`. See docs/serving.md.

A request goes through the web layer (who may ask, bounds, schema), is prepared (rendered, its pictures opened), and is
answered by an engine, many at once where the model can. What guards the first two lies in `processing_mmgpt/serving/`.
"""

import argparse
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.middleware import Middleware
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from modeling_mmgpt.adapters_mmgpt import quantization_config
from modeling_mmgpt.speed.serving import ManyAtOnce
from processing_mmgpt.image_files_mmgpt import ImagePolicy, shorten
from processing_mmgpt.processing_mmgpt import MMGPTProcessor
from processing_mmgpt.serving.bounds import Bounds
from processing_mmgpt.serving.callers import callers
from processing_mmgpt.serving.fetching import fetch
from processing_mmgpt.serving.metrics import Measured
from processing_mmgpt.serving.pictures import PictureDecoder
from processing_mmgpt.serving.refusing import refusal
from processing_mmgpt.serving.rendering import Renderer
from processing_mmgpt.serving.replies import Engine, OneByOne, Prompt, written
from processing_mmgpt.serving.running import closing, run


BOUNDS = {"max_body": 64 * 2**20, "max_held": 256 * 2**20, "max_at_work": 128}
MAX_MESSAGES, MAX_PARTS, MAX_PICTURES = 1000, 64, 16  # of a request, of a message, of a request
MAX_TEXT, MAX_ELEMENTS = 1_000_000, 10_000  # characters of a request; its fields, parts and brackets
DTYPES = ["auto", "float32", "bfloat16", "float16"]
COLDEST = 0.01  # temperature: colder ones divide to what is no number, which on a GPU ends the process's context

logger = logging.getLogger("uvicorn.error")


# What a request may say. What the server would not do is refused, not ignored, and the first error is the last.


class Strict(BaseModel):
    """A part of a request; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageURL(Strict):
    """Where a picture is. The `detail` is the same for every picture."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


class TextPart(Strict):
    """A text, or ours: the text of the `### Input:` block."""

    type: Literal["text", "input"]
    text: str


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]

    def parts(self) -> list[ImagePart | TextPart]:
        """Its parts; a bare string is one."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Chat(Strict):
    """A request, with the fields that are honoured, and those that may only say what is done anyway."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    model: str | None = None
    stream: bool = False
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    n: int = Field(1, ge=1, le=1)
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    stream_options: dict | None = None  # usage is always told
    user: str | None = None

    @field_validator("temperature")
    @classmethod
    def _leaves_numbers(cls, value: float | None) -> float | None:
        if value and value < COLDEST:
            raise ValueError(f"between 0 and {COLDEST} there is nothing left to sample; 0 takes the likeliest token")
        return value


def count_elements(body: bytes) -> int:
    """About how many elements a JSON text has, without reading it; what stands in strings does not count."""
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # every quote that is left begins or ends a string
    strings = plain.count(b'"') // 2
    if strings > MAX_ELEMENTS:
        return strings
    return sum(part.count(mark) for part in plain.split(b'"')[::2] for mark in (b",", b"[", b"{"))


def read_chat(body: bytes) -> Chat:
    """Read a request.

    Raises:
        ValueError: If it is none, or holds too much.
    """
    if count_elements(body) > MAX_ELEMENTS:
        raise ValueError(f"A request may have {MAX_ELEMENTS:,} elements.")
    try:
        chat = Chat.model_validate_json(body)
    except ValidationError as error:
        deepest = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        raise ValueError(f"{'.'.join(map(str, deepest['loc']))}: {deepest['msg']}"[:500]) from None
    parts = [part for message in chat.messages for part in message.parts()]
    if sum(isinstance(part, ImagePart) for part in parts) > MAX_PICTURES:
        raise ValueError(f"A chat may hold {MAX_PICTURES} pictures.")
    if sum(len(part.text) for part in parts if isinstance(part, TextPart)) > MAX_TEXT:
        raise ValueError(f"A chat may hold {MAX_TEXT:,} characters of text.")
    return chat


# How it is prepared


@dataclass(frozen=True)
class Preparation:
    """What makes prompts of chats.

    Args:
        renderer: Renders them.
        decoder: Opens their pictures.
        size: Side of the squares that the model sees, in pixels.
        longest: Tokens that the model has room for.
        max_new_tokens: The most tokens of a reply.
    """

    renderer: Renderer
    decoder: PictureDecoder
    size: int
    longest: int
    max_new_tokens: int

    async def prepare(self, chat: Chat) -> Prompt:
        """Make a prompt; raises `ValueError` if the chat cannot be answered as it is."""
        messages = [{"role": message.role, "content": [*map(as_ours, message.parts())]} for message in chat.messages]
        input_ids, sources = await self.renderer.render(messages, self.longest)
        wanted = chat.max_completion_tokens or chat.max_tokens or self.max_new_tokens
        unsaid = 0.0 if chat.top_p is None else 1.0
        return Prompt(
            input_ids,
            await self.decoder.squares(sources, self.size),
            max_new_tokens=min(wanted, self.max_new_tokens, self.longest - len(input_ids)),
            temperature=unsaid if chat.temperature is None else chat.temperature,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            stops=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
        )


def as_ours(part: ImagePart | TextPart) -> dict:
    """A part of OpenAI's in our form."""
    if isinstance(part, ImagePart):
        return {"type": "image", "image": part.image_url.url}
    return {"type": part.type, "text": part.text}


# How it is answered


def build_engine(model: PreTrainedModel, processor: MMGPTProcessor, kind: str, *sizes: int | None) -> Engine:
    """Start what answers many chats at once; or one after the other, if `kind` is `"one"`, or `"auto"` and it cannot.

    Args:
        model: The model.
        processor: Its processor.
        kind: `"auto"`, `"batched"` or `"one"`.
        *sizes: Further arguments of [`ManyAtOnce`].

    Raises:
        ImportError, ValueError: If `kind` is `"batched"` and it cannot.
    """
    if kind != "one":
        try:
            return ManyAtOnce(model, processor, *sizes)
        except (ImportError, ValueError) as error:
            if kind == "batched":
                raise
            logger.warning("Chats are answered one after the other: %s", error)
    return OneByOne(model, processor)


def build_app(name: str, preparation: Preparation, engine: Engine, **options) -> FastAPI:
    """Make the web application: chats, the name of the model, whether it is well, and what it does."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, **options)
    measured = Measured(engine)

    async def asked(request: Request) -> tuple[Prompt, bool]:
        """What a request asks for, and whether as a stream; nothing else of it is kept."""
        chat = read_chat(b"".join([chunk async for chunk in request.stream()]))
        if chat.model not in (None, name):
            raise ValueError(f"This server is pinned to {name!r}; asked for was {shorten(chat.model)}.")
        return await preparation.prepare(chat), chat.stream

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        try:
            prompt, is_stream = await asked(request)
        except ValueError as error:
            return refusal(400, str(error))
        request.state.let_go()
        if engine.error is not None:
            return refusal(503, DEAD)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        reply = written(measured, prompt)
        if is_stream:
            return StreamingResponse(events(reply, about, len(prompt.input_ids)), media_type="text/event-stream")
        try:
            pieces = [piece async for piece in reply]
        except ValueError as error:
            return refusal(400, str(error))
        except Exception:
            logger.exception("A reply failed.")
            return refusal(500, FAILED) if engine.error is None else refusal(503, DEAD)
        message = {"role": "assistant", "content": "".join(text for text, _, _ in pieces)}
        choice = {"index": 0, "message": message, "finish_reason": pieces[-1][2]}
        told = usage(len(prompt.input_ids), pieces[-1][1])
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": told})

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model"}]}

    @app.get("/health")
    def health() -> Response:
        return JSONResponse({"status": "ok"}) if engine.error is None else refusal(503, f"{DEAD} {engine.error}")

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(measured.registry), media_type=CONTENT_TYPE_LATEST)

    return app


FAILED = "The model failed over this request; the server's log says how."
DEAD = "What generates has died; the server has to be started anew."


async def events(reply: AsyncIterator, about: dict, prompt_tokens: int) -> AsyncIterator[str]:
    """A reply as server-sent events."""

    def event(delta: dict, end: str | None = None, **more) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        return f"data: {json.dumps({**about, 'object': 'chat.completion.chunk', 'choices': [choice], **more})}\n\n"

    yield event({"role": "assistant", "content": ""})
    async with aclosing(reply):
        try:
            async for text, tokens, end in reply:
                if text:
                    yield event({"content": text})
                if end:
                    yield event({}, end, usage=usage(prompt_tokens, tokens))
        except Exception:
            logger.exception("A reply failed.")
            yield f"data: {json.dumps({'error': {'message': FAILED, 'type': 'server_error'}})}\n\n"
    yield "data: [DONE]\n\n"


def usage(prompt_tokens: int, tokens: int) -> dict:
    """What a reply took, in tokens."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


def loading(device: str, dtype: str | None, quantization: str) -> dict:
    """Arguments for `from_pretrained`; see the options of this program."""
    is_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    dtype = dtype or ("float32" if is_cpu else "auto")
    how = {"device_map": device, "dtype": dtype}
    if quantization != "none":
        compute_dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        how["quantization_config"] = quantization_config(quantization, compute_dtype)
    return how


def main() -> None:
    """Load, serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of an adapter or a model")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; the default is this machine only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--allowed-host", action="append", default=[], help="a name by which clients call this server")
    parser.add_argument("--api-key", default=os.environ.get("MMGPT_API_KEY"), help="or in MMGPT_API_KEY, unseen by ps")
    parser.add_argument("--image-host", action="append", default=[], help="a host that pictures may be fetched from")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of the longest reply")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0")
    parser.add_argument("--dtype", choices=DTYPES, help="by default float32 on a CPU, else the model's own")
    parser.add_argument("--quantization", choices=["none", "nf4", "int8"], default="none", help="by bitsandbytes")
    parser.add_argument("--engine", choices=["auto", "batched", "one"], default="auto", help="many at once, or not")
    parser.add_argument("--max-chats", type=int, default=32, help="that are answered at once; others wait")
    parser.add_argument(
        "--cache-tokens", type=int, help="of all those chats; by default 16,384 on a CPU, else what fits"
    )
    args = parser.parse_args()
    try:
        processor = AutoProcessor.from_pretrained(args.model)
        renderer = Renderer(processor)
        how = loading(args.device, args.dtype, args.quantization)
        model = AutoModelForImageTextToText.from_pretrained(args.model, **how).eval()
        renderer.wait()
        engine = build_engine(model, processor, args.engine, args.max_chats, args.cache_tokens)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{args.model} cannot be served: {error}")
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    policy = ImagePolicy(fetch=partial(fetch, hosts=args.image_host) if args.image_host else None)
    decoder = PictureDecoder(policy)
    preparation = Preparation(renderer, decoder, processor.image_processor.size, engine.room, args.max_new_tokens)
    guards = [*callers([args.host, *args.allowed_host], args.api_key), Middleware(Bounds, **BOUNDS)]
    at_end = closing(engine, renderer, decoder)
    app = build_app(name, preparation, engine, middleware=guards, lifespan=at_end)
    run(app, args.host, args.port)


if __name__ == "__main__":
    main()
