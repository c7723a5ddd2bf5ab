"""The program inside a box: answers requests, and keeps Python's state from one to the next.

    host -> worker (fd 0)   length, 4 bytes big-endian; JSON {"id": 1, "op": "python", ...}
    worker -> host (a pipe) the same; JSON {"id": 1, "outcome": "ok", "value": null}
    fd 1 and 2              what the code prints, on a pipe of its own

It limits itself before the first request and is trusted until then; afterwards the host takes all
that it says for the words of the code it ran.
"""

import ast
import base64
import errno
import json
import linecache
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

sys.path += ["/worker", "/packages"]
Request = dict[str, Any]


def limit(limits: dict[str, int]) -> None:
    """Lower what this process and all that it starts may use; nothing raises it again."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


class Worker:
    """Runs one request at a time."""

    def __init__(self, requests: BinaryIO, reply_fd: int) -> None:
        self._requests = requests
        self._reply_fd = reply_fd
        self._pid = os.getpid()
        self._num_calls = 0
        self._names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        self._operations: dict[str, Callable[[Request], Any]] = {
            "python": self._python,
            "functions": self._functions,
            "write": _write,
            "read": _read,
            "probe": _probe,
        }

    def serve(self) -> None:
        """Answer requests until the host closes the pipe."""
        while len(head := self._requests.read(4)) == 4:
            request = json.loads(self._requests.read(int.from_bytes(head, "big")))
            outcome, value = self._answer(request)
            if os.getpid() != self._pid:  # a child that the code forked has come back to here
                os._exit(0)
            self.send({"id": request["id"], "outcome": outcome, "value": value})

    def send(self, message: dict[str, Any]) -> None:
        """Write one frame."""
        data = json.dumps(message).encode()
        data = len(data).to_bytes(4, "big") + data
        while data:
            data = data[os.write(self._reply_fd, data) :]

    def _answer(self, request: Request) -> tuple[str, Any]:
        value = None
        try:
            value = self._operations[request["op"]](request)
            json.dumps(value)
            outcome = "ok"
        except BaseException as error:  # SystemExit and all else that the code may raise
            outcome = _outcome(error)
            _print_error(error)
        _flush()
        return outcome, value if outcome == "ok" else None

    def _python(self, request: Request) -> None:
        """Run code; like an interactive session, show the value of a last expression."""
        self._num_calls += 1
        tree, name = _parse(request["code"], f"<call {self._num_calls}>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self._names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), self._names)
            if value is not None:
                print(repr(value))

    def _functions(self, request: Request) -> list[Any]:
        """Define what the code defines, and call one function of it with each list of arguments.

        A call that raises gives null and does not keep the others from being made.
        """
        tree, name = _parse(request["code"], "<answer>")
        exec(compile(tree, name, "exec"), self._names)
        function = self._names[request["function"]]
        results: list[Any] = []
        for arguments in request["arguments"]:
            try:
                results.append({"value": json.loads(json.dumps(function(*arguments)))})
            except Exception:
                results.append(None)
        return results


def _parse(code: str, name: str) -> tuple[ast.Module, str]:
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    return ast.parse(code, name), name


def _write(request: Request) -> None:
    with open(os.path.join("/box", os.path.basename(request["name"])), "wb") as file:
        file.write(base64.b64decode(request["data"]))


def _read(request: Request) -> dict[str, Any]:
    """One part of a file's text; what the parsers' libraries import is imported by need."""
    import readers

    text = readers.read(request["path"], request["kind"])
    start = request["start"]
    return {"text": text[start : start + request["size"]], "total": len(text)}


def _probe(request: Request) -> dict[str, str]:
    import probes

    results: dict[str, str] = probes.run(request["secrets"])
    return results


def _outcome(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    refused = isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN
    if refused or (isinstance(error, RuntimeError) and "start new thread" in str(error)):
        return "processes"
    return "error"


def _print_error(error: BaseException) -> None:
    """The traceback from the code's own first line on."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        traceback.print_exception(type(error), error, trace, limit=20, file=sys.stderr)
    except BaseException:  # the code may have replaced sys.stderr, or the error's own methods
        os.write(2, type(error).__name__.encode())


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BaseException:  # the code may have closed or replaced it
        os.write(2, b"stdout could not be flushed\n")


def main() -> None:
    """Limit this process, say that it is ready, and serve."""
    limits, layers, reply_fd = json.loads(sys.argv[1])
    os.closerange(3, reply_fd)  # whatever else the server's process has left open
    os.closerange(reply_fd + 1, 2**20)
    limit(limits)
    version = 0
    if layers:
        import landlock

        version = landlock.restrict("/box")
    worker = Worker(os.fdopen(os.dup(0), "rb"), reply_fd)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    worker.send({"id": 0, "outcome": "ok", "value": version})
    worker.serve()


if __name__ == "__main__":
    main()
