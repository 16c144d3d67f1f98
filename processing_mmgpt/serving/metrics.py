"""What an engine does, in numbers for Prometheus."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .replies import Engine, Prompt


class Measured:
    """An engine of which chats, tokens and times are counted, in a `registry`; one for each server.

    Args:
        engine: What writes the replies; its `counts` are shown as they are.
    """

    def __init__(self, engine: Engine):
        self.engine, self.registry = engine, CollectorRegistry()
        about = {"namespace": "mmgpt", "registry": self.registry}
        self.waiting = Gauge("chats_waiting", "Chats whose reply has not begun", **about)
        self.running = Gauge("chats_running", "Chats whose reply is being written", **about)
        self.tokens = Counter("tokens", "Tokens of replies", **about)
        self.first = Histogram("first_token_seconds", "Seconds from a chat to the first token of its reply", **about)
        for name in engine.counts():
            Gauge(name, "See `counts` of the engine", **about).set_function(partial(self._count, name))

    def _count(self, name: str) -> int:
        return self.engine.counts()[name]

    async def write(self, prompt: Prompt) -> AsyncIterator[str]:
        """See [`Engine`]."""
        start, state = time.perf_counter(), self.waiting
        state.inc()
        try:
            async with aclosing(self.engine.write(prompt)) as texts:
                async for text in texts:
                    if state is self.waiting:
                        self.first.observe(time.perf_counter() - start)
                        state.dec()
                        state = self.running
                        state.inc()
                    self.tokens.inc()
                    yield text
        finally:
            state.dec()
