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
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware import Middleware
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from modeling_mmgpt.adapters_mmgpt import quantization_config
from modeling_mmgpt.speed.serving import ManyAtOnce
from processing_mmgpt.image_files_mmgpt import ImagePolicy, shorten
from processing_mmgpt.processing_mmgpt import MMGPTProcessor
from processing_mmgpt.serving.bounds import Bounds
from processing_mmgpt.serving.callers import callers
from processing_mmgpt.serving.chats import Chat, read_chat
from processing_mmgpt.serving.fetching import fetch
from processing_mmgpt.serving.metrics import Measured
from processing_mmgpt.serving.pictures import PictureDecoder
from processing_mmgpt.serving.refusing import refusal
from processing_mmgpt.serving.rendering import Renderer
from processing_mmgpt.serving.replies import Engine, OneByOne, Prompt, written
from processing_mmgpt.serving.running import closing, run


BOUNDS = {"max_body": 64 * 2**20, "max_held": 256 * 2**20, "max_at_work": 128}
DTYPES = ["auto", "float32", "bfloat16", "float16"]

logger = logging.getLogger("uvicorn.error")


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
        messages = [{"role": m.role, "content": [part.ours() for part in m.parts()]} for m in chat.messages]
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

    def failure(error: Exception) -> Response:
        """What the client is told if its reply fails: what is wrong with the request, or that it was not its fault."""
        if isinstance(error, ValueError):
            return refusal(400, str(error))
        logger.error("A reply failed.", exc_info=error)
        return refusal(500, FAILED) if engine.error is None else refusal(503, DEAD)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        try:
            prompt, is_stream = await asked(request)
        except ValueError as error:
            return failure(error)
        request.state.let_go()
        if engine.error is not None:
            return refusal(503, DEAD)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        reply = written(measured, prompt)
        if is_stream:
            streamed = events(reply, about, len(prompt.input_ids), failure)
            return StreamingResponse(streamed, media_type="text/event-stream")
        try:
            pieces = [piece async for piece in reply]
        except Exception as error:
            return failure(error)
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


async def events(
    reply: AsyncIterator, about: dict, prompt_tokens: int, failure: Callable[[Exception], Response]
) -> AsyncIterator[str]:
    """A reply as server-sent events; if it fails, the last tells what a reply in one piece would have told."""

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
        except Exception as error:
            yield f"data: {failure(error).body.decode()}\n\n"
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
    parser.add_argument("--max-chats", type=int, help="that are answered at once; by default 32 on a CPU, else 128")
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
