"""Chat text: the model's template, its tokenizer, and Hermes tool calls as Qwen3 writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer

from understudy.errors import ConfigError
from understudy.trajectory import IntArray

ToolStyle = Literal["schemas", "signatures"]
ChatMessage = Mapping[str, Any]
"""{"role", "content"}; an assistant's may have "tool_calls": [{"name", "arguments"}]."""

CALL_START, CALL_END = "<tool_call>", "</tool_call>"


class ChatFormat:
    """A model bundle's chat template and tokenizer.

    The template is rendered in jinja2's sandbox, as transformers does.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, stop_token_ids: Sequence[int], style: ToolStyle
    ) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        self.style = style
        self.stop_texts = {index: self.decode(np.array([index])) for index in self.stop_token_ids}
        self._template = environment.from_string(template)
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = tuple(token.content for token in added)

    @classmethod
    def load(cls, folder: Path, style: ToolStyle) -> "ChatFormat":
        """Load from a model bundle's folder.

        Raises:
            ConfigError: when a file is missing or cannot be read.
        """
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            stop = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
            template = _read_template(folder)
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"model.path = '{folder}': no usable chat bundle: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception for every fault
            raise ConfigError(f"model.path = '{folder}': tokenizer.json: {error}") from None
        return cls(tokenizer, template, [stop] if isinstance(stop, int) else stop, style)

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Text of a conversation, ending where the assistant would go on if asked for.

        Args:
            tools: [{"name", "description", "parameters"}], parameters being a JSON schema.
        """
        return self._template.render(
            messages=messages,
            tools=[{"type": "function", "function": tool} for tool in tools] or None,
            tool_style=self.style,
            add_generation_prompt=add_generation_prompt,
        )

    def encode(self, text: str) -> IntArray:
        """Token ids of template text; special tokens in it count as such."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, token_ids: IntArray) -> str:
        """Text of token ids, special tokens included."""
        return str(self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))

    def neutralise(self, text: str) -> str:
        """Break special tokens in text from outside, so that it cannot open or close a turn."""
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text.encode("utf-8", "replace").decode("utf-8")

    def neutralise_all(self, value: Any) -> Any:
        """Neutralise every string, keys included, of a value as JSON has it."""
        if isinstance(value, str):
            return self.neutralise(value)
        if isinstance(value, Mapping):
            return {self.neutralise(key): self.neutralise_all(v) for key, v in value.items()}
        if isinstance(value, Sequence):
            return [self.neutralise_all(item) for item in value]
        return value


def _read_template(folder: Path) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    return str(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool call that the policy wrote."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A policy's reply, read."""

    text: str
    """What stands outside of calls and thoughts, stripped."""
    calls: tuple[Call, ...] = ()
    malformed: str = ""
    """What is wrong with a call, for the policy to read; empty if all is well."""


def parse_reply(text: str) -> Reply:
    """Read a reply in Hermes format: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    A call that cannot be read makes the whole reply malformed: nothing of it is executed.
    """
    text = text.rpartition("</think>")[2]
    outside, *blocks = text.split(CALL_START)
    calls = []
    for block in blocks:
        body, end, rest = block.partition(CALL_END)
        outside += rest
        if not end:
            return Reply(text=outside.strip(), malformed=f"{CALL_START} without {CALL_END}")
        call = _parse_call(body)
        if isinstance(call, str):
            return Reply(text=outside.strip(), malformed=call)
        calls.append(call)
    return Reply(text=outside.strip(), calls=tuple(calls))


def _parse_call(body: str) -> Call | str:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return "the call is not valid JSON"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return 'the call is no object with a "name"'
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return '"arguments" is no object'
    return Call(name=value["name"], arguments=arguments)
