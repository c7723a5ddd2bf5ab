"""Finds suites by registered name or by `module:Class`."""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from envserver.environment import Suite
from understudy.errors import ConfigError

GROUP = "understudy.suites"


def load_suites(names: Sequence[str]) -> dict[str, Suite]:
    """Load and construct suites, keyed by their own names.

    Raises:
        ConfigError: for a name that is not registered, or a class that is no Suite.
    """
    suites = {}
    for name in names:
        suite = _load(name)()
        suites[suite.name] = suite
    return suites


def _load(name: str) -> type[Suite]:
    found = _import_class(name) if ":" in name else _registered(name)
    if not (isinstance(found, type) and issubclass(found, Suite)):
        raise ConfigError(f"envserver.suites: {name!r} is {found!r}, not a subclass of Suite")
    return found


def _registered(name: str) -> object:
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in known:
        raise ConfigError(
            f"envserver.suites: {name!r} is not registered; known: {', '.join(sorted(known))}; "
            f"register it under the entry-point group {GROUP}, or name it as module:Class"
        )
    return known[name].load()


def _import_class(name: str) -> object:
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # a user's module beside the config, not installed
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"envserver.suites: cannot load {name!r}: {error}") from error
