"""Replies of a policy, as an actor reads them and sends them on."""

import json
import random

from tests.fuzz.mutation import mutate_bytes
from understudy.chat import CALL_END, CALL_START, parse_reply
from understudy.client.environment import _utf8

MAX_LEN = 1024
_PIECES = (
    *(CALL_START, CALL_END, "<think>", "</think>", "<|im_end|>", "[" * 40, "]" * 40, '{"a":' * 20),
    *('{"name": "x", "arguments": {}}', '"\\ud800"', "NaN", "-Infinity", "1e999", "9" * 90),
    *(
        "\x00",
        "\u2028",
        '"name"',
        '"arguments"',
        "null",
        "\ud800",
        "\u00e9",
        ",",
        ":",
        "{",
        "}",
        '"',
    ),
)


def seeds() -> list[bytes]:
    """Replies with no, one and two calls, with a thought, and broken ones."""
    call = f'{CALL_START}{{"name": "add", "arguments": {{"a": [1, 2.5, null]}}}}{CALL_END}'
    texts = ("", "42", call, f"<think>so</think>it is {call}\n{call} done", call[:-9], call[:30])
    return [text.encode() for text in (*texts, f"{CALL_START}[]{CALL_END}")]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Insert pieces that mean something, or change bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        text = data.decode("utf-8", "replace")
        at = rng.randint(0, len(text))
        changed = text[:at] + rng.choice(_PIECES) + text[at + rng.choice((0, 0, 1, 5)) :]
        encoded = changed.encode("utf-8", "surrogatepass")
        if len(encoded) <= max_size:
            return encoded
    return mutate_bytes(data, max_size, seed)


def TestOneInput(data: bytes) -> None:
    """Read a reply; its calls can be sent, and only one without calls has anything malformed."""
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    reply = parse_reply(text)
    assert not (reply.calls and reply.malformed)
    assert reply.text == reply.text.strip()
    for call in reply.calls:
        _utf8(call.name).encode()
        _utf8(json.dumps(call.arguments)).encode()
    _utf8(reply.text).encode()
