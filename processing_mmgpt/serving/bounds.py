"""What one request may cost the others: a body within bounds and in time, and work for as long as somebody waits."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusing import refusal


UNHURRIED, PACE = 2**20, 0.002  # bytes beyond which chunks of 64 KiB come one at a time, and the seconds between them
SMALL = 64 * 2**10  # bytes of a body that is always taken; so much each connection buffers anyway


@dataclass(eq=False)
class _Body:
    """A body that is held: its chunks, and the deadline of its reading, `None` once that is over."""

    deadline: asyncio.Timeout | None
    chunks: deque[bytes] = field(default_factory=deque)
    size: int = 0


class Bounds:
    """ASGI middleware: takes a request's body whole before the application sees it, and ends work for nobody.

    Limits count requests whose body is there, so a connection that is silent or stops half-way takes nobody's place.
    The memory of all bodies together is bounded: beyond it the oldest that is still being sent is given up. The
    application calls `request.state.let_go()` as soon as it holds the body no more. What it does for a client that has
    gone is cancelled. Refusals go out one after the other, with a pause: who sends nothing but nonsense waits.

    Args:
        app: The application.
        max_body: Bytes of the largest body.
        max_held: Bytes of all bodies that are being sent or read.
        max_at_work: Requests with a body that are answered at the same time, those that wait included.
        seconds: What sending a body may take, beside what it takes at `rate`.
        rate: Bytes a second of the slowest client.
        pause: Seconds between two refusals.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body: int,
        max_held: int,
        max_at_work: int,
        seconds: float = 10.0,
        rate: float = 32 * 2**10,
        pause: float = 0.05,
    ):
        self.app = app
        self.max_body, self.max_held, self.max_at_work = max_body, max_held, max_at_work
        self.seconds, self.rate, self.pause = seconds, rate, pause
        self.bodies: dict[_Body, None] = {}  # the oldest first
        self.held = self.at_work = 0  # bytes, requests
        self.pace, self.refusals = asyncio.Lock(), asyncio.Lock()  # a busy event loop slows who generates in a thread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take the body, then let the application answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def unhurried(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                async with self.refusals:
                    await asyncio.sleep(self.pause)
            await send(message)

        body = _Body(asyncio.timeout(self.seconds))
        self.bodies[body] = None
        try:
            refused = await self._take_in_time(body, Headers(scope=scope), receive)
            if refused is None and body.size and self.at_work >= self.max_at_work:
                full = f"The server is at work on {self.at_work} requests: try again later."
                refused = refusal(503, full, **{"Retry-After": "5"})
            if refused is not None:
                await refused(scope, receive, unhurried)
                return
            counts = int(body.size > 0)
            self.at_work += counts
            try:
                await self._answer(scope, body, receive, unhurried)
            finally:
                self.at_work -= counts
        finally:
            self._let_go(body)

    async def _take_in_time(self, body: _Body, headers: Headers, receive: Receive) -> Response | None:
        try:
            async with body.deadline:
                return await self._take(body, headers, receive)
        except TimeoutError:
            return refusal(408, "The request's body did not come in time.", Connection="close")
        finally:
            body.deadline = None

    async def _take(self, body: _Body, headers: Headers, receive: Receive) -> Response | None:
        """Take a body, or say why not."""
        start = asyncio.get_running_loop().time()
        too_large = refusal(413, f"A request may have {self.max_body:,} bytes.")
        if int(headers.get("content-length", 0)) > self.max_body:
            return too_large
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return Response()
            chunk = message.get("body", b"")
            body.chunks.append(chunk)
            body.size += len(chunk)
            self.held += len(chunk)
            if body.size > self.max_body:
                return too_large
            if body.size > SMALL and not self._make_room(body):
                return refusal(503, "The server holds too many large requests: try again later.", Connection="close")
            if not message.get("more_body", False):
                return None
            if body.size > UNHURRIED:
                async with self.pace:
                    await asyncio.sleep(PACE)
            body.deadline.reschedule(start + self.seconds + body.size / self.rate)

    def _make_room(self, body: _Body) -> bool:
        """Give up others that are still being sent, the oldest first, until all that are left fit; whether they do."""
        if self.held > self.max_held:
            for other in [o for o in self.bodies if o.deadline and o.size > SMALL and o is not body]:
                other.deadline.reschedule(0)
                self._let_go(other)
                if self.held <= self.max_held:
                    break
        return self.held <= self.max_held

    def _let_go(self, body: _Body) -> None:
        self.bodies.pop(body, None)
        self.held -= body.size
        body.size = 0
        body.chunks.clear()

    async def _answer(self, scope: Scope, body: _Body, receive: Receive, send: Send) -> None:
        """Let the application answer as long as the client is there."""
        gone = asyncio.Event()

        async def replay() -> Message:
            if body.chunks:
                chunk = body.chunks.popleft()
                return {"type": "http.request", "body": chunk, "more_body": bool(body.chunks)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            present.reschedule(0)

        state = {**scope.get("state", {}), "let_go": partial(self._let_go, body)}
        try:
            async with asyncio.timeout(None) as present:
                watching = asyncio.create_task(watch())
                try:
                    await self.app({**scope, "state": state}, replay, send)
                finally:
                    watching.cancel()
        except TimeoutError:
            if not gone.is_set():
                raise
