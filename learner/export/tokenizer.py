"""The tokenizers of a run, if they can be found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from understudy.errors import ConfigError
from understudy.trajectory import IntArray

Decode = Callable[[IntArray], str]
"""Text of token ids, special tokens included."""


class Decoders:
    """The decoders of an agent's parts, of which some may be of another model than the run's.

    Args:
        run: the run's folder.

    Raises:
        ConfigError: a tokenizer.json is there but cannot be read.
    """

    def __init__(self, run: Path) -> None:
        config = _read_config(run)
        self.model = str(config.get("model", {}).get("path", ""))
        """`model.path` of the run's configuration; empty if the run has none."""
        policies, agents = config.get("policies", {}), config.get("agents", {})
        used = {part: agent.get("policy") for part, agent in agents.items() if agent.get("policy")}
        self._models = {part: str(policies[policy]["model"]) for part, policy in used.items()}
        folders = [run / "model", *([Path(self.model)] if self.model else [])]
        self.own = next(filter(None, map(_find, folders)), None)
        """Of the model that the run saved, or of the one that it began with."""
        self._others = {part: _find(Path(model)) for part, model in self._models.items()}

    def of(self, part: str) -> Decode | None:
        """What decodes a part's tokens."""
        return self._others.get(part, self.own)

    def model_of(self, part: str) -> str:
        """Model that a part is of."""
        return self._models.get(part, self.model)

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts of other models without a tokenizer here."""
        return tuple(sorted(part for part, decode in self._others.items() if decode is None))


def _read_config(run: Path) -> dict[str, Any]:
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError):
        return {}


def _find(folder: Path) -> Decode | None:
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for every fault
        raise ConfigError(f"{file}: no usable tokenizer: {error}") from None
    return lambda ids: str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
