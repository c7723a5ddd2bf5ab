"""A byte-level BPE tokenizer for a small model, frugal on one suite's text.

Words that tool calls pass as arguments get a token each, so that passing a name on is copying one
token, wherever it stands. What is left between them are phrases, and BPE merges those that are
frequent up to a whole line:

    `\\n{"name": "lookup", "arguments": {"entity": "`  `Hana`  `", "field": "`  `staff`  `"}}\\n`

Any other text falls back on shorter merges, at the last on bytes, and comes back unchanged.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Left out where text is decoded for people."""

MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Tokens of their own that decoded text keeps, as in Qwen3."""

_PHRASE = r"\p{N}|[^\p{N}\n]+\n*|\n+[^\p{N}\n]*\n*"
"""A digit, or a line up to its end: merges cross neither digits nor lines."""

_WORD = re.compile(r"[^\W\d_][\w.]*[^\W\d_]")


def train_tokenizer(
    texts: Sequence[str], conversations: Iterable[Mapping[str, Any]], vocab_size: int
) -> Tokenizer:
    """Train on rendered conversations.

    Args:
        texts: the conversations as the chat template renders them.
        conversations: the same as data, for the words that their tool calls pass.
        vocab_size: most tokens in all; bytes, tokens of their own and words come off it first.
    """
    words = argument_words(conversations)
    splitter = _splitter(words)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(words),
        special_tokens=[*SPECIAL_TOKENS, *MARKUP_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitter
    trained.train_from_iterator(_phrases(texts, words), trainer)
    tokenizer = Tokenizer(_with_words(trained, words))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in MARKUP_TOKENS])
    return tokenizer


def argument_words(conversations: Iterable[Mapping[str, Any]]) -> list[str]:
    """Words that are whole arguments of at least two tool calls, in alphabetical order."""
    counts = Counter(
        value
        for conversation in conversations
        for message in conversation["messages"]
        for call in message.get("tool_calls") or ()
        for value in call.get("function", call)["arguments"].values()
        if isinstance(value, str) and _WORD.fullmatch(value)
    )
    return sorted(word for word, count in counts.items() if count > 1)


def _alternatives(words: Sequence[str]) -> str:
    # Longest first: an alternation takes the first that matches.
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _splitter(words: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    copied = rf"(?<!\w)(?:{_alternatives(words)})(?!\w)"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(copied), behavior="isolated"),
            pre_tokenizers.Split(Regex(_PHRASE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _phrases(texts: Iterable[str], words: Sequence[str]) -> Iterable[str]:
    """What stands between the tokens that need no training."""
    fixed = "|".join(re.escape(text) for text in (*SPECIAL_TOKENS, *MARKUP_TOKENS))
    boundary = re.compile(rf"{fixed}|(?<!\w)(?:{_alternatives(words)})(?!\w)")
    for text in texts:
        yield from filter(None, boundary.split(text))


def _with_words(trained: Tokenizer, words: Sequence[str]) -> models.BPE:
    """The trained model, with a token for each word that no merges lead to."""
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in words:
        token = "".join(part for part, _ in as_bytes.pre_tokenize_str(word))
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    # ignore_merges: a piece that is in the vocabulary is one token, however it came there.
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
