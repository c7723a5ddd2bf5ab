"""Writes docs/configuration.md from the models of understudy.config.

python docs/make_configuration.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from understudy.config import Config
from understudy.config.base import Section
from understudy.config.shared import ProcessConfig

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
# Configuration

<!-- docs/make_configuration.py writes this page. Edit the models in understudy/config instead. -->

One TOML file a run, one section a role. Every role of a run gets the same file and reads its own
section, `[run]`, `[network]` and what it needs of `[model]` and `[learner.tasks]`. A minimal file:

    [model]
    path = "models/base"

Everything else has a default that suits one machine: loopback addresses, default ports.

- `--set section.key=value` overrides one value of the file, as often as wanted. The value is a TOML
  literal; what is no literal is a string. `--set run.name=second --set 'actor.cpus=[0, 1]'`
- An unknown key is refused, with the one that was probably meant. So is a value out of range, with
  its place and what is allowed.
- `understudy run` and `understudy demo` write the resolved configuration to `config.json` in the
  run's folder; it can be given to `--config` like a TOML file.
- `understudy ROLE --help` prints the keys of the role's section.
- `learner.tasks.max_tokens` above `inference.max_model_len` is refused. An actor refuses to start
  where the suite's split has fewer tasks than `learner.tasks.first_ordinal` plus `num_tasks`.
- Relative paths are relative to the directory that the command is started in.
- An address is `host:port`, or `unix:/path` for a Unix socket; port 0 takes a free one. An address
  beyond this machine needs `[network.tls]` or `--insecure`: see [operations](operations.md#tls).
  Metrics are HTTP, on `host:port` only.

Three shipped files are examples: [configs/demo.toml](../configs/demo.toml), which `make demo` uses,
[configs/agents.toml](../configs/agents.toml), for an [agent of two parts](agents.md), and
[configs/qwen3-32b.toml](../configs/qwen3-32b.toml), for a GPU cluster, which has not been run.
"""

PATTERNS = {
    "unix:": "address",
    "https?:": "URL",
    "\\d{1,5}": "host:port",
    "._-": "letters, digits and `._-`",
    "9_-]{1,64}": "name",
}
"""What a string's pattern has in it, and what that is called."""
PLURALS = {"address": "addresses"}
BOUNDS = {
    "minimum": "from {}",
    "exclusiveMinimum": "above {}",
    "maximum": "to {}",
    "exclusiveMaximum": "below {}",
}


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page's text."""
    return "\n".join([HEAD, *_section("", Config)]).rstrip() + "\n"


def _section(name: str, section: type[Section], brackets: str = "[{}]") -> Iterator[str]:
    """A heading, the section's purpose and a row for each key; then the sections within."""
    properties = section.model_json_schema()["properties"]
    inner: list[tuple[str, type[Section], str]] = []
    rows = []
    for key, field in section.model_fields.items():
        child = _section_of(field.annotation)
        if child:
            path = f"{name}.{key}" if name else key
            if get_origin(field.annotation) is dict:
                path += ".NAME"
            brackets = "[[{}]]" if get_origin(field.annotation) is tuple else "[{}]"
            inner.append((path, child, brackets))
        else:
            default = "required" if field.is_required() else _toml(field.get_default())
            meaning = field.description or _inherited(key)
            rows.append(
                f"| `{key}` | {_kind(properties[key])} | {default} | {_one_line(meaning)} |"
            )
    if name:
        title = brackets.format(name)
        purpose = _one_line((section.__doc__ or "").partition(":")[2])
        yield f"## `{title}`\n\n{purpose[0].upper()}{purpose[1:]}\n"
        yield "| key | value | default | meaning |\n|---|---|---|---|"
        yield "\n".join(rows) + "\n"
    for path, child, brackets in inner:
        yield from _section(path, child, brackets)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or holds several of."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _inherited(key: str) -> str:
    """What a key that every role has means: the roles' sections only give it a default."""
    return ProcessConfig.model_fields[key].description or ""


def _kind(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in schema:
        schema = next(option for option in schema["anyOf"] if option["type"] != "null")
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} numbers"
        item = _kind(schema["items"])
        return f"list of {PLURALS.get(item, f'{item}s')}"
    if schema.get("format") == "path":
        return "path"
    if "pattern" in schema:
        return next(kind for mark, kind in PATTERNS.items() if mark in schema["pattern"])
    if schema["type"] == "boolean":
        return "true or false"
    bounds = [text.format(f"{schema[key]:g}") for key, text in BOUNDS.items() if key in schema]
    return " ".join([schema["type"], *bounds])


def _toml(value: Any) -> str:
    """A default as TOML would have it."""
    if value is None:
        return "not set"
    return f"`{json.dumps(value, default=str)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
