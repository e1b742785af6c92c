"""A real server on 127.0.0.1 that speaks the chat completions protocol, and does to each call what a test scripts."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

# Status and what the model says (a str), or a raw body (bytes); None hangs up; a function writes what it likes to the socket.
Reply = tuple[int, Any] | Callable[[BinaryIO], None] | None
Script = Callable[[str, int], Reply]  # of the answer that is judged, and how often it has been asked for


class ChatServer(ThreadingHTTPServer):
    """Answers ``POST /v1/chat/completions`` by its script, ``latency`` seconds later; remembers what it was asked."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 256, True

    def __init__(self, script: Script, latency: float = 0.0, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.latency = script, latency
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = body["messages"][-1]["content"].split("<answer>\n")[1].split("\n</answer>")[0]
        server = self.server
        with server.lock:
            server.asked[answer] += 1
            times = server.asked[answer]
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.latency)
        reply = server.script(answer, times)
        with server.lock:
            server.at_once -= 1
        if reply is None:
            self.close_connection = True
            self.connection.close()
            return
        if callable(reply):
            self.close_connection = True
            reply(self.wfile)
            return
        status, said = reply
        if isinstance(said, bytes):
            payload = said
        elif status == 200:
            payload = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        else:
            payload = json.dumps({"error": {"message": f"{said} {self.headers['Authorization']}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if status == 429:
            self.send_header("Retry-After-Ms", "20")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def serving(script: Script, latency: float = 0.0, port: int = 0) -> Iterator[ChatServer]:
    """A server for the time of a block."""
    server = ChatServer(script, latency, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
