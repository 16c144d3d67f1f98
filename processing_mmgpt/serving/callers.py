"""Who may ask: by the name of the server, by the page that has a browser ask, and by a key."""

import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from .refusing import refusal


LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def callers(hosts: Sequence[str], key: str | None = None) -> list[Middleware]:
    """What looks at the callers of an application, as its `middleware`.

    Args:
        hosts: Names by which clients may call the server, beside those of this machine alone; "*" for any. A page that
            points a name of its own at this server comes with that name.
        key: What clients have to send as `Authorization: Bearer KEY`; `None` for nothing.
    """
    named = Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, *hosts], www_redirect=False)
    return [named, Middleware(OwnPages), *([Middleware(WithKey, key=key)] if key else [])]


class OwnPages:
    """Refuses what a page of another origin has a browser send; programs send no `Origin`."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 403, or let the application answer."""
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else {}
        origin = headers.get("origin")
        app = self.app
        if origin is not None and _place(origin) != headers.get("host"):
            app = refusal(403, "This server takes no requests from pages of other origins.")
        await app(scope, receive, send)


def _place(origin: str) -> str | None:
    """Host and port of an origin."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


class WithKey:
    """Refuses whoever does not know the key; `/health` is for everybody."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 401, or let the application answer."""
        app = self.app
        if scope["type"] in ("http", "websocket") and scope["path"] != "/health":
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self.expected):
                app = refusal(401, "This server wants its key: `Authorization: Bearer KEY`.")
        await app(scope, receive, send)
