"""Runs one fuzz target: `python -m tests.fuzz NAME [libFuzzer's options]`; or `--list` for names.

    seeds() -> files -> libFuzzer -> mutate(data, max_size, seed) -> TestOneInput(data)

Any exception that a target lets through ends the run with an exit code other than 0, and with the
input in a file of the folder that is printed first.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris

from tests.fuzz import TARGETS

ROUND_RUNS = 200_000


def main(arguments: list[str]) -> None:
    """Fuzz one target, or print the names of all."""
    if arguments == ["--list"]:
        print(*TARGETS, sep="\n")
        return
    if not arguments or arguments[0] not in TARGETS:
        raise SystemExit(f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} [-runs=N ...]")
    name, *options = arguments
    folder = Path(tempfile.mkdtemp(prefix=f"understudy-fuzz-{name}-"))
    (folder / "corpus").mkdir()
    print(f"{name}: inputs are kept in {folder}", flush=True)
    for number, round_options in enumerate(rounds(options)):
        if code := in_a_child(name, round_options, folder, first=number == 0):
            raise SystemExit(code)


def rounds(options: list[str]) -> Iterator[list[str]]:
    """Options of each process. Under instrumentation atheris keeps up to 3 KB of each input's run,
    so that a process gets no more than ROUND_RUNS of them; the corpus stays."""
    given = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    left, seed = int(given.get("runs", "0")), int(given.get("seed", "1"))
    if left <= ROUND_RUNS:
        yield options
        return
    others = [option for option in options if not option.startswith(("-runs=", "-seed="))]
    while left > 0:
        yield [*others, f"-runs={min(left, ROUND_RUNS)}", f"-seed={seed}"]
        left, seed = left - ROUND_RUNS, seed + 1


def in_a_child(name: str, options: list[str], folder: Path, first: bool) -> int:
    """Fuzz in a process of its own, which libFuzzer ends without any cleaning up. Returns its exit
    code."""
    # In memory where there is such a folder: some targets write a file for each input.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        child = os.fork()
        if not child:
            tempfile.tempdir = scratch
            fuzz(name, options, folder, first)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def fuzz(name: str, options: list[str], folder: Path, first: bool) -> None:
    """Fuzz until libFuzzer's options say so, which ends the process."""
    with atheris.instrument_imports(include=list(TARGETS[name])):
        target = importlib.import_module(f"tests.fuzz.{name}")
    corpus = folder / "corpus"
    for index, seed in enumerate(target.seeds() if first else ()):
        (corpus / f"seed-{index}").write_bytes(seed)
    # Without leak detection: it looks for C++ leaks, and slows every input that seems to grow.
    fixed = (f"-artifact_prefix={folder}/", "-detect_leaks=0", f"-max_len={target.MAX_LEN}")
    words = [sys.argv[0], *fixed, *options, str(corpus)]
    atheris.Setup(words, target.TestOneInput, custom_mutator=target.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
