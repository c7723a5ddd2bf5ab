"""The import rule: roles import understudy only, understudy imports no role, help nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

ROLES = {"actor", "learner", "inference", "envserver", "launch"}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", sorted(ROLES | {"understudy"}))
def test_no_room_imports_another_role(room: str) -> None:
    crossing = {
        str(path.relative_to(ROOT)): imports(path) & (ROLES - {room})
        for path in (ROOT / room).rglob("*.py")
    }
    assert {path: names for path, names in crossing.items() if names} == {}


def test_intake_imports_no_torch_and_trainer_serves_no_network() -> None:
    for room in ("intake", "weights"):
        for path in (ROOT / "learner" / room).rglob("*.py"):
            assert "torch" not in imports(path), path
    for path in (ROOT / "learner" / "weights").rglob("*.py"):
        assert "learner.intake" not in path.read_text(), path
    for path in (ROOT / "learner" / "trainer").rglob("*.py"):
        assert "RoleServer" not in path.read_text(), path


@pytest.mark.parametrize(
    "words", [["--help"], ["actor", "--help"], ["eval", "--help"], ["learner", "--help"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from understudy.cli import main; sys.argv = ['understudy', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'transformers', 'grpc', 'matplotlib', 'openai'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "understudy" in done.stdout


def test_an_unknown_command_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "understudy.cli", "trian"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown command 'trian'" in done.stderr
