"""What keeps one client from hurting the others before its request is read: the API key, and limits
on connections, on the time that a header and a body take, and on the body's size.

Refuses to know routes and the engine. Test: pytest server
"""
import asyncio
import hmac
import time

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.protocol import error_response


def max_connections():
    """As many as the limit on open files allows, with some left for the rest of the process."""
    try:
        import resource
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:                 # not on Windows
        limit = 512
    return min(max(limit - 100, 16), 10_000)


HEADER_SECONDS = 10     # that a client may take to send the header of a request
BODY_SECONDS = 60       # that it may take to send the body
MAX_CONNECTIONS = max_connections()
OPEN = ("/health", "/")     # paths without the API key; the page at / asks its reader for it


class Guard:
    """ASGI middleware: asks for the API key everywhere but on OPEN, and refuses a body that is
    larger than max_body bytes or takes longer than BODY_SECONDS to come."""

    def __init__(self, app, api_key, max_body):
        self.app, self.max_body = app, max_body
        self.wanted = api_key and api_key.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.wanted and scope["path"] not in OPEN:
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.wanted):
                refuse = error_response(401, "missing or wrong API key", "invalid_api_key",
                                        {"WWW-Authenticate": "Bearer"})
                return await refuse(scope, receive, send)
        num_bytes, whole, end = 0, False, time.monotonic() + BODY_SECONDS

        async def receive_bounded():
            nonlocal num_bytes, whole
            if whole:                   # what comes now is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise HTTPException(
                    408, f"the body took longer than {BODY_SECONDS} seconds to come") from None
            num_bytes += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if num_bytes > self.max_body:
                raise HTTPException(
                    413, f"the body is larger than {self.max_body} bytes (--max-body)")
            return message
        await self.app(scope, receive_bounded, send)


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP, with a limit on connections and on the time that a header takes: a client
    that opens hundreds and sends nothing must not take all the descriptors."""
    timer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self.timer = self.loop.call_later(HEADER_SECONDS, self._close_unless_begun)

    def data_received(self, data):
        super().data_received(data)
        if self._waits_for_header():
            self.timer = self.timer or self.loop.call_later(
                HEADER_SECONDS, self._close_unless_begun)
        else:
            self._stop_timer()

    def connection_lost(self, exc):
        self._stop_timer()
        super().connection_lost(exc)

    def _waits_for_header(self):
        return self.cycle is None or self.cycle.response_complete

    def _close_unless_begun(self):
        self.timer = None
        if self._waits_for_header():
            self.transport.close()

    def _stop_timer(self):
        if self.timer:
            self.timer.cancel()
            self.timer = None
