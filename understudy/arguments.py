"""Arguments that every role's command takes: the run's TOML and overrides of it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from understudy.config import Config, load_config
from understudy.config.base import Section


def config_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with --config, --set and --insecure, and the role's keys as its epilog."""
    section = Config.model_fields.get(command)
    parser = argparse.ArgumentParser(
        prog=f"understudy {command}",
        description=description,
        epilog=_describe(command, section.annotation) if section else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the file; may be repeated",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="allow plaintext beyond this machine"
    )
    return parser


def load_from(arguments: argparse.Namespace) -> Config:
    """The configuration that parsed arguments name."""
    insecure = ["network.insecure=true"] if arguments.insecure else []
    return load_config(arguments.config, [*arguments.set, *insecure])


def parse_config(command: str, argv: Sequence[str]) -> Config:
    """Parse a role's command line into its configuration."""
    return load_from(config_parser(command, f"Start the {command} role.").parse_args(argv))


def _describe(prefix: str, section: object) -> str:
    assert isinstance(section, type)
    assert issubclass(section, Section)
    lines = [f"keys of [{prefix}]:"]
    for name, field in section.model_fields.items():
        text = " ".join((field.description or "").split())
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines.append(f"\n{_describe(f'{prefix}.{name}', field.annotation)}")
        else:
            default = "" if field.is_required() else f" (default {field.get_default()!r})"
            lines.append(f"  {name}: {text}{default}")
    return "\n".join(lines)
