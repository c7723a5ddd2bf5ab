"""Messages from the text of a prompt, by the marks that chat templates of Qwen's kind put there.

Text from outside cannot forge a mark: actors break special tokens in it before they render it.
"""

import re
from typing import NamedTuple

STOP = "<|im_end|>"
_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_FIRST_RESULT, _LAST_RESULT = "<tool_response>\n", "\n</tool_response>"
_ASSISTANT = "assistant"


class Message(NamedTuple):
    """What somebody other than the policy said."""

    role: str
    """As chat templates know it, for example "user"."""
    content: str


def read_messages(text: str) -> list[Message]:
    """The messages of a prompt that follow the last reply in it.

    A template that rewrites history has it all in the prompt again. A template of another kind
    gives one message of the user.
    """
    found = [Message(*match.groups()) for match in _MESSAGE.finditer(text)]
    if not found:
        return [Message("user", text.strip())] if text.strip() else []
    if found[-1].role == _ASSISTANT:  # the opening of the reply that is asked for
        found.pop()
    replies = [index for index, message in enumerate(found) if message.role == _ASSISTANT]
    fresh = found[replies[-1] + 1 :] if replies else found
    return [part for message in fresh for part in _split(message)]


def _split(message: Message) -> list[Message]:
    """Results of tools, which templates put into a message of the user, one by one."""
    content = message.content.strip()
    if not (content.startswith(_FIRST_RESULT) and content.endswith(_LAST_RESULT)):
        return [message]
    inside = content.removeprefix(_FIRST_RESULT).removesuffix(_LAST_RESULT)
    return [Message("tool", part) for part in inside.split(f"{_LAST_RESULT}\n{_FIRST_RESULT}")]
