"""Running a server by uvicorn, with the deadlines that keep a silent client from costing anything."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from .pictures import PictureDecoder
from .rendering import Renderer
from .replies import Engine


HEAD_SECONDS = 10  # from the connection, or the reply before, to the end of a request's head
SHUTDOWN_SECONDS = 3  # that work under way gets at the end
SWITCH_SECONDS = 0.0005  # Python's 0.005 let a busy event loop slow the thread that generates by a third


class InTime(H11Protocol):
    """HTTP/1.1 of uvicorn, which has no deadline for the head of a request: closes a connection without one."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.deadline = self.loop.call_later(HEAD_SECONDS, self.close_if_idle)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self.deadline.cancel()
        self.deadline = self.loop.call_later(HEAD_SECONDS, self.close_if_idle)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self.deadline.cancel()
        super().connection_lost(exc)

    def close_if_idle(self) -> None:
        """Close, unless a request is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def closing(*things: Renderer | PictureDecoder | Engine) -> Callable[[ASGIApp], AbstractAsyncContextManager[None]]:
    """The `lifespan` of an application that closes things at its end; after a signal there is no other time for it."""

    @asynccontextmanager
    async def lifespan(app: ASGIApp) -> AsyncIterator[None]:
        yield
        for thing in things:
            thing.close()

    return lifespan


def run(app: ASGIApp, host: str, port: int) -> None:
    """Serve until a signal; work that is then under way gets a few seconds."""
    if sys.platform != "win32":
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a silent connection takes a file, and nothing else
    sys.setswitchinterval(SWITCH_SECONDS)
    uvicorn.run(app, host=host, port=port, http=InTime, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
