"""docs/adapters.md: its environment is served and played, its tables have all options."""

import asyncio
import re
import sys
import tomllib
from pathlib import Path

import pytest

from adapter_helpers import ADAPTERS
from benchmarks.rollout import free_address
from conftest import ROOT
from envserver.adapters.gymnasium import GymnasiumOptions
from envserver.adapters.mcp import McpOptions
from envserver.adapters.openenv import OpenEnvOptions
from envserver.environment import Suite
from envserver.registry import import_object, load_suites
from understudy.client import EnvironmentClient
from understudy.config.base import Section
from understudy.errors import ConfigError

PAGE = (ROOT / "docs" / "adapters.md").read_text()


def fence(language: str) -> str:
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(code)


async def test_the_guides_environment_is_served_and_played(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(fence("python"))
    address = free_address()
    (tmp_path / "run.toml").write_text(
        f"[model]\npath = 'none'\n[envserver]\nlisten = '{address}'\n"
        f"metrics_listen = '127.0.0.1:0'\n{fence('toml')}"
    )
    command = [sys.executable, "-m", "understudy.cli", "envserver", "--config", "run.toml"]
    environment = {"PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(*command, cwd=tmp_path, env=environment)
    try:
        async with EnvironmentClient.connect(address) as client:
            await client.wait_ready()
            assert (await client.describe("guess")).digest == "guess-1-20"
            async with client.session() as session:
                await session.reset("guess", "train", 5)
                said = (await session.step(text="Is it 3?")).messages[0]["content"]
                assert said == "Reply with a number."
                low, high = 1, 20
                while low <= high:
                    guess = (low + high) // 2
                    step = await session.step(text=str(guess))
                    if step.terminated:
                        break
                    if step.messages[0]["content"] == "Lower.":
                        high = guess - 1
                    else:
                        low = guess + 1
            assert (step.reward, step.terminated) == (1.0, True)
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 60) == 0


def test_the_guides_environment_is_as_short_as_it_says() -> None:
    lines = [line for line in fence("python").splitlines() if line.strip()]
    assert len(lines) <= 30, len(lines)


@pytest.mark.parametrize("options", [GymnasiumOptions, McpOptions, OpenEnvOptions])
def test_the_guide_has_every_option(options: type[Section]) -> None:
    for name in options.model_fields:
        assert f"\n| `{name}` |" in PAGE or (name == "url" and "Options are `url`" in PAGE), name


def test_every_adapter_is_registered_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"]["understudy.suites"]
    assert {name: registered[name] for name in ADAPTERS} == ADAPTERS
    assert set(ADAPTERS) <= set(project["optional-dependencies"])
    for name, place in ADAPTERS.items():
        found = import_object(place)
        assert isinstance(found, type), name
        assert issubclass(found, Suite), name


def test_an_adapter_without_its_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "lost-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lost\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[understudy.suites]\nlost = lost_module:Lost\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"No module named 'lost_module'; .*understudy\[lost\]"):
        load_suites({"lost": {}})
