"""An HTTP client for endpoints that are not trusted: a call ends in time, a reply has a size, nothing is sent on elsewhere."""

import sys
import threading
import time
from typing import Any

from openai import DefaultHttpxClient, OpenAIError

MAX_REPLY = 2**20  # bytes of a reply: some hundred times the longest that a judge gives

http: Any = sys.modules[DefaultHttpxClient.__mro__[-2].__module__.partition(".")[0]]  # openai's own: httpx, or a fork of it


class ReplyRefusedError(OpenAIError):
    """A reply that is not read."""


class BoundedClient(DefaultHttpxClient):
    """Reads a reply as a whole: within ``seconds`` from the first byte sent to the last one read, and up to ``MAX_REPLY``.

    A client's usual timeout is one of silence, which a server outlives by a byte now and then. Compression is not asked for nor
    undone, since a small body may unfold to any size. A redirect is an answer like any other, and is not followed.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(timeout=seconds, follow_redirects=False, headers={"Accept-Encoding": "identity"})
        self.seconds = seconds

    def send(self, request: Any, **settings: Any) -> Any:
        """The reply, read.

        Raises:
            ReadTimeout: of the HTTP library: it was not there in time.
            ReplyRefusedError: it is too large, or compressed.
        """
        found: list[Any] = []

        def read() -> None:
            try:
                found.append(self._read(request, settings))
            except BaseException as error:
                found.append(error)

        reader = threading.Thread(target=read, daemon=True)  # one that hangs in a name server, or in headers, is left behind
        reader.start()
        reader.join(self.seconds)
        if not found:
            raise http.ReadTimeout("the reply took too long", request=request)
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    def _read(self, request: Any, settings: dict[str, Any]) -> Any:
        deadline, body = time.monotonic() + self.seconds, bytearray()
        reply = super().send(request, **settings | {"stream": True})
        try:
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise ReplyRefusedError("the reply is compressed, which was not asked for")
            for part in reply.iter_raw():
                body += part
                if len(body) > MAX_REPLY:
                    raise ReplyRefusedError(f"the reply is larger than {MAX_REPLY} bytes")
                if time.monotonic() > deadline:
                    raise http.ReadTimeout("the reply took too long", request=request)
        finally:
            reply.close()
        return http.Response(reply.status_code, headers=reply.headers, content=bytes(body), request=request)
