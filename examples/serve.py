"""Serve a model by the chat server of transformers, for clients of OpenAI's API.

    pip install -e ".[serve]" -c constraints.txt
    python examples/serve.py outputs/quickstart/adapter --port 8000

The model is a folder or a Hub id, of an adapter or of a whole model; it is served under the name of its folder or its
id. Pictures come as data URLs; addresses are fetched only from hosts named by `--image-host`. See docs/serving.md.

`transformers serve` itself takes only classes of transformers, and its `/load_model` loads whatever a stranger names.
So this program takes its chat handler and leaves the rest.
"""

import argparse
import asyncio
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from processing_mmgpt import MMGPTProcessor
from processing_mmgpt.image_files_mmgpt import ImagePolicy, open_image
from processing_mmgpt.serving.fetching import fetch


MAX_BODY = 64 * 2**20  # bytes of a request, with all its pictures
MAX_PICTURES = 16  # of a request
MAX_TEXT = 1_000_000  # characters of a request; tokenizing them takes time and memory
MAX_DECODING = 2  # requests whose pictures are decoded at the same time, each up to some 200 MB
MAX_CONNECTIONS = 256  # more are told to come back later


# What a request may say. What the server would not do is refused, not ignored.


class Strict(BaseModel):
    """A part of a request; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


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


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class Chat(Strict):
    """A request, with the fields that are honoured, and those that may only say what is done anyway."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool = False
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field([], max_length=8)
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    stream_options: dict | None = None  # usage is always told
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value):
        return [value] if isinstance(value, str) else value or []


# How it is answered


class OneModel(ModelManager):
    """The model manager that its handler asks: it has one model, already loaded."""

    def __init__(self, name: str, model: PreTrainedModel, processor: MMGPTProcessor):
        self.force_model, self.model, self.processor = name, model, processor

    @staticmethod
    def process_model_name(name: str) -> str:
        """Leave the name as it is, without a revision."""
        return name

    def load_model_and_processor(self, *args, **kwargs) -> tuple[PreTrainedModel, MMGPTProcessor]:
        """Hand out the model, whatever is asked for: the handler has compared the name."""
        return self.model, self.processor

    @staticmethod
    def get_model_modality(*args, **kwargs) -> Modality:
        """Text and pictures; transformers knows this of its own classes only."""
        return Modality.VLM


class Generator(GenerateManager):
    """Generates one reply after the other, up to the first stop sequence, which OpenAI's API leaves out of the reply.

    Of itself `transformers serve` keeps it in the reply, and fails on one that the vocabulary cannot spell.
    """

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        """Start a reply; gives the queue of its pieces, and the streamer, which can cancel it."""
        stops, inputs = _take_stops(gen_config, processor, inputs)
        pieces, streamer = super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        reply = asyncio.Queue()
        reply.writer = asyncio.create_task(copy_until(stops, pieces, reply))  # kept as long as somebody reads
        return reply, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        """Give the text of a reply, the length of its prompt, and its ids."""
        stops, inputs = _take_stops(gen_config, processor, inputs)
        text, *rest = await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        return text[: find_first(text, stops)], *rest


class HasStop(StoppingCriteria):
    """Whether a stop sequence has come up in the reply to a prompt of `length` tokens."""

    def __init__(self, stops: Sequence[str], processor: MMGPTProcessor, length: int):
        self.stops, self.processor, self.length = stops, processor, length

    def __call__(self, input_ids: torch.LongTensor, *args, **kwargs) -> torch.BoolTensor:
        """Look through the reply `(1, T)` so far."""
        text = self.processor.decode(input_ids[0, self.length :], skip_special_tokens=True)
        return torch.tensor([find_first(text, self.stops) < len(text)], device=input_ids.device)


def _take_stops(config: GenerationConfig, processor: MMGPTProcessor, inputs: dict) -> tuple[list[str], dict]:
    """Move the stop sequences from the settings to the arguments of `generate`, as a criterion of ours."""
    stops, config.stop_strings = config.stop_strings or [], None
    criterion = HasStop(stops, processor, inputs["input_ids"].shape[1])
    return stops, {**inputs, "stopping_criteria": StoppingCriteriaList([criterion])}


def find_first(text: str, stops: Sequence[str]) -> int:
    """Where the first stop sequence begins; the length of the text where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))


async def copy_until(stops: Sequence[str], pieces: asyncio.Queue, reply: asyncio.Queue) -> None:
    """Copy pieces of text up to a stop sequence, and what ends them; hold back what may be the beginning of one."""
    held, is_open = "", True
    while isinstance(piece := await pieces.get(), str):
        if not is_open:
            continue
        held += piece
        end = find_first(held, stops)
        is_open = end == len(held)
        if is_open:
            sizes = [size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size])]
            end -= max(sizes, default=0)
        reply.put_nowait(held[:end])
        held = held[end:]
    if is_open:
        reply.put_nowait(held)
    reply.put_nowait(piece)


class OneThread(GenerationState):
    """The generation state that the handler asks: everything by one generator."""

    def __init__(self):
        super().__init__()
        self.generator = Generator()

    def get_manager(self, *args, **kwargs) -> Generator:
        """Hand it out."""
        return self.generator


class ChatHandler(ChatCompletionHandler):
    """The chat handler of transformers, with our pictures and limits."""

    def __init__(self, manager: OneModel, policy: ImagePolicy, max_new_tokens: int):
        super().__init__(manager, OneThread())
        self.policy, self.max_new_tokens = policy, max_new_tokens
        self.decoding = asyncio.Semaphore(MAX_DECODING)
        tokens = manager.processor.tokenizer.model_max_length  # for a model of unlimited positions
        self.longest = getattr(manager.model.config.text_config, "max_position_embeddings", tokens)

    async def prepare(self, chat: Chat) -> dict:
        """Check a request and open its pictures.

        Raises:
            ValueError: If it cannot be answered as it is.
        """
        processor = self.model_manager.processor
        async with self.decoding:
            messages = await asyncio.to_thread(to_messages, chat, processor, self.policy)
            prompt = await asyncio.to_thread(processor.encode_chat, messages, add_generation_prompt=True)
        length = len(prompt.input_ids)
        if length >= self.longest:
            raise ValueError(f"The chat has {length} tokens; with the reply the model has room for {self.longest}.")
        wanted = chat.max_completion_tokens or chat.max_tokens or self.max_new_tokens
        body = {"messages": messages, "max_completion_tokens": min(wanted, self.max_new_tokens, self.longest - length)}
        return body | chat.model_dump(include={"model", "stream", "temperature", "top_p", "stop"}, exclude_none=True)

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        """Leave the messages alone: they are ours already."""
        return messages

    def _build_generation_config(self, body: dict, *args, **kwargs):
        """Sample where a request says how; transformers stays greedy unless the model's own settings sample."""
        config = super()._build_generation_config(body, *args, **kwargs)
        if config.temperature != 0 and ("temperature" in body or "top_p" in body):
            config.do_sample = True
        return config


def to_messages(chat: Chat, processor: MMGPTProcessor, policy: ImagePolicy) -> list[dict]:
    """Turn OpenAI's messages into ours, each picture opened under the policy and cut to what the model sees.

    Raises:
        ValueError: If there are too many pictures or letters, or a picture is refused.
    """
    parts = [part for message in chat.messages if not isinstance(message.content, str) for part in message.content]
    if sum(isinstance(part, ImagePart) for part in parts) > MAX_PICTURES:
        raise ValueError(f"A chat may hold {MAX_PICTURES} pictures.")
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if sum(map(len, [*texts, *(m.content for m in chat.messages if isinstance(m.content, str))])) > MAX_TEXT:
        raise ValueError(f"A chat may hold {MAX_TEXT:,} characters of text.")

    def ours(part: ImagePart | TextPart) -> dict:
        if isinstance(part, TextPart):
            return part.model_dump()
        picture = processor.image_processor.square(open_image(part.image_url.url, policy))
        return {"type": "image", "image": picture}

    return [
        {"role": m.role, "content": m.content if isinstance(m.content, str) else [*map(ours, m.content)]}
        for m in chat.messages
    ]


def build_app(handler: ChatHandler) -> FastAPI:
    """Make the web application: chats, the name of the model, and whether it is there."""
    app = FastAPI(max_body_size=MAX_BODY, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(chat: Chat) -> Response:
        try:
            body = await handler.prepare(chat)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return await handler.handle_request(body, f"chatcmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [{"id": handler.model_manager.force_model, "object": "model"}]}

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        deepest = max(error.errors(), key=lambda one: len(one["loc"]))
        return refusal(400, f"{'.'.join(map(str, deepest['loc'][1:]))}: {deepest['msg']}")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return refusal(error.status_code, error.detail)

    return app


def refusal(status: int, message: str) -> JSONResponse:
    """Say why not, as OpenAI's API does."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


def main() -> None:
    """Load, serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of an adapter or a model")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; the default is this machine only"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--image-host", action="append", default=[], help="a host that pictures may be fetched from")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of the longest reply")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0")
    args = parser.parse_args()
    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", device_map=args.device).eval()
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.model} cannot be loaded, or its base cannot: {error}")
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    policy = ImagePolicy(fetch=partial(fetch, hosts=args.image_host) if args.image_host else None)
    handler = ChatHandler(OneModel(name, model, processor), policy, args.max_new_tokens)
    uvicorn.run(build_app(handler), host=args.host, port=args.port, limit_concurrency=MAX_CONNECTIONS)


if __name__ == "__main__":
    main()
