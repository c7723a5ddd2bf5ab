"""Errors that people see. Each message names the field, the value and the remedy."""


class UnderstudyError(Exception):
    """Base of errors that end a command with one clear line instead of a traceback."""


class ConfigError(UnderstudyError, ValueError):
    """A configuration that cannot be used."""


class PeerUnreachableError(UnderstudyError):
    """A peer did not answer within the configured time."""
