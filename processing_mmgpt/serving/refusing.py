"""How a request is refused."""

from starlette.responses import JSONResponse


def refusal(status: int, message: str, **headers: str) -> JSONResponse:
    """Say why not, as OpenAI's API does."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
