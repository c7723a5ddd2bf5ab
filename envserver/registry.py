"""Finds suites by registered name or by `module:Class`, and gives them their options."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from pydantic import ValidationError

from envserver.environment import Suite
from understudy.config.base import Section, explain
from understudy.errors import ConfigError

GROUP = "understudy.suites"


def load_suites(
    suites: Sequence[str] | Mapping[str, Mapping[str, object]],
) -> dict[str, Suite]:
    """Load and construct suites from their names, or from their tables by name; keyed by name.

    A table's `adapter` says which class plays it, by default the one registered under the table's
    own name; all other keys are options of that class.

    Raises:
        ConfigError: for a name that is not registered, a class that is no Suite, options that its
            model refuses, and whatever else a suite finds wrong when it is made.
    """
    if isinstance(suites, Mapping):
        made = [_configure(name, table) for name, table in suites.items()]
    else:
        made = [_make(name, name, {}) for name in suites]
    return {suite.name: suite for suite in made}


def _configure(name: str, table: Mapping[str, object]) -> Suite:
    options = dict(table)
    adapter = options.pop("adapter", name)
    if not isinstance(adapter, str):
        raise ConfigError(
            f"envserver.suites.{name}.adapter = {adapter!r} is no string; give a registered name "
            "or module:Class"
        )
    suite = _make(adapter, name, options)
    if suite.name != name:
        raise ConfigError(
            f"envserver.suites.{name}: the suite of {adapter!r} is called {suite.name!r}; give "
            "the table that name"
        )
    return suite


def _make(adapter: str, name: str, options: Mapping[str, object]) -> Suite:
    found = _load(adapter)
    place = f"envserver.suites.{name}"
    if found.Options is None:
        if options:
            raise ConfigError(f"{place}: {adapter!r} takes no options; leave out {sorted(options)}")
        return found()
    construct: Callable[[str, Section], Suite] = found
    try:
        return construct(name, found.Options.model_validate(options))
    except ValidationError as error:
        raise explain(error, found.Options, place) from None
    except (ValueError, OSError) as error:  # a file that is missing or holds something else
        raise ConfigError(f"{place}: {error}") from error


def _load(name: str) -> type[Suite]:
    found = import_object(name) if ":" in name else _registered(name)
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
    try:
        return known[name].load()
    except ImportError as error:
        raise ConfigError(
            f"envserver.suites: cannot load {name!r}: {error}; install it: an adapter's packages "
            f"come with the extra of its name, pip install 'understudy[{name}]'"
        ) from error


def import_object(name: str) -> object:
    """What `module:name` names, also in the working directory. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # a user's module beside the config, not installed
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"envserver.suites: cannot load {name!r}: {error}") from error
