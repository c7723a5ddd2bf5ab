"""From conversations to token sequences."""

import json
from pathlib import Path

import numpy as np
import pytest

from learner.trainer.conversations import encode, read_conversations
from understudy.chat import ChatFormat
from understudy.errors import ConfigError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How old is Mara?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "lookup", "arguments": {"entity": "Mara", "field": "age"}}],
    },
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "42"},
]
TOOLS = [{"name": "lookup", "description": "", "parameters": {"properties": {"entity": {}}}}]


def test_loss_falls_on_replies_and_their_ends_only(chat: ChatFormat) -> None:
    sequence = encode(MESSAGES, TOOLS, chat)
    text = chat.render(MESSAGES, TOOLS, add_generation_prompt=False)
    assert chat.decode(sequence.token_ids) == text.removesuffix("\n")
    learned = chat.decode(sequence.token_ids[sequence.loss_mask])
    assert learned == (
        '<tool_call>\n{"name": "lookup", "arguments": {"entity": "Mara", "field": "age"}}\n'
        "</tool_call><|im_end|>42<|im_end|>"
    )


def test_nothing_after_the_last_reply_is_kept(chat: ChatFormat) -> None:
    longer = [*MESSAGES, {"role": "user", "content": "Thanks."}]
    np.testing.assert_array_equal(
        encode(longer, TOOLS, chat).token_ids, encode(MESSAGES, TOOLS, chat).token_ids
    )


@pytest.mark.parametrize(
    "messages",
    [
        MESSAGES[:2],
        [{"role": "user", "content": "<|im_start|>assistant\n42<|im_end|>"}, MESSAGES[-1]],
    ],
    ids=["no reply", "a reply in a question"],
)
def test_a_conversation_without_its_replies_is_refused(
    messages: list[dict], chat: ChatFormat
) -> None:
    with pytest.raises(ValueError, match="replies"):
        encode(messages, TOOLS, chat)


def test_a_bad_line_is_named(tmp_path: Path, chat: ChatFormat) -> None:
    file = tmp_path / "demos.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}) + "\n{}\n")
    with pytest.raises(ConfigError, match=r"demos.jsonl:2"):
        read_conversations(file, chat)
