"""An OpenAI-compatible endpoint over real HTTP, whose model is a function of the request."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

from envserver.environment import Action, Message, Step, ToolOutcome
from envserver.suites.practice.expert import Expert
from envserver.suites.practice.tasks import make_task

Request = dict[str, Any]
Model = Callable[[Request], "Answer"]


class Answer:
    """What the endpoint sends: a status and a JSON body, or text as it is."""

    def __init__(
        self, body: dict[str, Any] | str, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.body = body if isinstance(body, str) else json.dumps(body)
        self.status = status
        self.headers = headers or {}


def says(
    text: str | None = None,
    *calls: tuple[str, str],
    finish_reason: str = "stop",
    tokens: tuple[int, int] = (50, 5),
) -> Answer:
    """A completion of some text and calls: (name, arguments as JSON text)."""
    tool_calls = [
        {
            "id": f"call-{index}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for index, (name, arguments) in enumerate(calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tool_calls:
        message["tool_calls"] = tool_calls
    prompt, completion = tokens
    return Answer(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": "scripted",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
        }
    )


def refuses(status: int, message: str, **headers: str) -> Answer:
    """An error as OpenAI writes them."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
    return Answer(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


class Endpoint(ThreadingHTTPServer):
    """Remembers what it was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: Model) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.requests: list[Request] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            answer = self.server.model(body)
        content = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def endpoint(model: Model) -> Iterator[Endpoint]:
    """Serve a model on a free port."""
    with Endpoint(model) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class ExpertModel:
    """Plays practice test tasks as the scripted expert, seeing nothing but the conversation."""

    def __init__(self, num_tasks: int) -> None:
        tasks = [make_task("test", ordinal) for ordinal in range(num_tasks)]
        self._tasks = {task.question: task for task in tasks}

    def __call__(self, request: Request) -> Answer:
        """Go on with a conversation."""
        messages = request["messages"]
        questions = [message["content"] for message in messages if message["role"] == "user"]
        if questions[0] not in self._tasks:
            return says("OK")
        actions = Expert(self._tasks[questions[0]], Random(0)).actions()
        action = next(actions)
        for message in messages:
            if message["role"] == "tool":
                observation = Message(role="tool", content=message["content"])
                outcome = ToolOutcome(name="any", ok=True)
                action = actions.send(Step(messages=[observation], tool_outcomes=[outcome]))
        return _say(action)


def _say(action: Action) -> Answer:
    calls = [(call.name, json.dumps(call.arguments)) for call in action.tool_calls]
    return says(action.text, *calls, finish_reason="tool_calls" if calls else "stop")
