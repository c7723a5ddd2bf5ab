"""Conversations as token sequences with a loss mask.

A conversation is encoded in the pieces in which an actor sees it: the prompt, each reply, what the
environment added. So the tokens are those that a policy would have sampled, and loss falls on
replies alone, <|im_end|> included, never on headers or observations.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from learner.trainer.packing import TokenSequence
from understudy.chat import ChatFormat
from understudy.errors import ConfigError

TURN_END = "<|im_end|>"


def read_conversations(path: Path, chat: ChatFormat) -> list[TokenSequence]:
    """Encode chat JSON lines: {"messages": [...], "tools": [...]} a line.

    Raises:
        ConfigError: naming the line that is no conversation.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"demonstrations {path}: {error.strerror}") from None
    sequences = []
    for number, line in enumerate(lines, start=1):
        try:
            conversation = json.loads(line)
            sequences.append(encode(conversation["messages"], conversation.get("tools", ()), chat))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}:{number}: no conversation: {error!r}") from None
    if not sequences:
        raise ConfigError(f"demonstrations {path}: no lines")
    return sequences


def encode(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], chat: ChatFormat
) -> TokenSequence:
    """Encode one conversation up to the end of its last reply.

    Raises:
        ValueError: when the text does not hold one reply for each assistant message, and one at
            least.
    """
    header = _reply_header(chat)
    before, *turns = chat.render(messages, tools, add_generation_prompt=False).split(header)
    if len(turns) != sum(message["role"] == "assistant" for message in messages) or not turns:
        raise ValueError(f"{len(turns)} replies begin with {header!r}")
    ids, mask = [], []
    for turn in turns:
        reply, end, after = turn.partition(TURN_END)
        prompt_ids, reply_ids = chat.encode(before + header), chat.encode(reply + end)
        ids += [prompt_ids, reply_ids]
        mask += [np.zeros(len(prompt_ids), bool), np.ones(len(reply_ids), bool)]
        before = after
    return TokenSequence(token_ids=np.concatenate(ids), loss_mask=np.concatenate(mask))


@cache
def _reply_header(chat: ChatFormat) -> str:
    """What the template puts before each reply."""
    question = [{"role": "user", "content": ""}]
    without = chat.render(question, add_generation_prompt=False)
    return chat.render(question, add_generation_prompt=True).removeprefix(without)
