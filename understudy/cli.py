"""The `understudy` command. Each role owns its commands and registers them as entry points, so that
this module imports no role, and `--help` nothing heavy."""

import sys
from importlib.metadata import EntryPoint, entry_points

from understudy.errors import UnderstudyError

GROUP = "understudy.commands"


def main() -> None:
    """Find the named command, load it, and exit with its code."""
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage(commands))
        return
    if name not in commands:
        print(f"understudy: unknown command {name!r}\n\n{_usage(commands)}", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(commands[name].load()(sys.argv[2:]))
    except UnderstudyError as error:
        print(f"understudy {name}: {error}", file=sys.stderr)
        sys.exit(1)


def _usage(commands: dict[str, EntryPoint]) -> str:
    names = "\n".join(f"  {name}" for name in sorted(commands))
    return (
        "usage: understudy COMMAND [options]\n\n"
        f"commands (understudy COMMAND --help tells more):\n{names}"
    )


if __name__ == "__main__":
    main()
