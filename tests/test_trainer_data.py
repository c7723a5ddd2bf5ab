"""From conversations and batches to padded micro-batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.trainer.conversations import encode, read_conversations
from learner.trainer.microbatches import TokenSequence, cut, microbatches, pad
from understudy.chat import ChatFormat
from understudy.errors import ConfigError

CPU = torch.device("cpu")
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


def sequences(lengths: list[int]) -> list[TokenSequence]:
    return [
        TokenSequence(token_ids=np.arange(1, n + 1, dtype="i4"), loss_mask=np.arange(n) % 3 == 2)
        for n in lengths
    ]


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


@given(
    lengths=st.lists(st.integers(2, 90), max_size=40),
    max_tokens=st.integers(1, 400),
    num=st.integers(0, 12),
)
def test_microbatches_hold_each_sequence_once_within_the_limit(
    lengths: list[int], max_tokens: int, num: int
) -> None:
    made = list(microbatches(sequences(lengths), max_tokens, num, CPU))
    held = [len(s.token_ids) for micro in made for s in micro.sequences]
    assert sorted(held) == sorted(lengths)
    assert len(made) >= num
    for micro in made:
        assert micro.num_padded_tokens <= max_tokens or len(micro.sequences) <= 1


def test_targets_are_the_counted_tokens_at_the_positions_before_them() -> None:
    micro = pad(sequences([7, 4]), CPU)
    assert micro.tokens_BT.tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 0]]
    assert micro.positions_N.tolist() == [1, 4, 7 + 1]
    assert micro.targets_N.tolist() == [3, 6, 3]


def test_like_lengths_go_together() -> None:
    pieces = cut(sequences([10, 90, 11, 88, 12, 89]), 300)
    assert [[len(s.token_ids) for s in piece] for piece in pieces] == [[90, 89, 88], [12, 11, 10]]
