"""The tokenizer of a run, if it can be found."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from understudy.errors import ConfigError
from understudy.trajectory import IntArray

Decode = Callable[[IntArray], str]
"""Text of token ids, special tokens included."""


def model_of(run: Path) -> str:
    """`model.path` of the run's configuration; empty if the run has none."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return str(config["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def find_decoder(run: Path) -> Decode | None:
    """Decoder of the model that the run saved, or of the one that it began with.

    Raises:
        ConfigError: a tokenizer.json is there but cannot be read.
    """
    model = model_of(run)
    for folder in (run / "model", *([Path(model)] if model else [])):
        file = folder / "tokenizer.json"
        if file.exists():
            return _load(file)
    return None


def _load(file: Path) -> Decode:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for every fault
        raise ConfigError(f"{file}: no usable tokenizer: {error}") from None
    return lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
