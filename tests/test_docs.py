"""Documentation is true where a program can tell: links, commands, paths, metrics, code."""

import asyncio
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client.metrics import MetricWrapperBase

from conftest import ROOT, serving
from envserver.registry import load_suites
from envserver.servicer import EnvironmentServicer
from monitoring.queries import exposed_name
from understudy import metrics
from understudy.config import Config, EnvserverConfig
from understudy.rpc import RoleControl, Service
from understudy.v1 import environment_pb2_grpc

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ROOMS = (
    "actor|benchmarks|configs|docs|envserver|examples|inference|launch|learner|monitoring|protos"
)
PATH = re.compile(rf"`((?:{ROOMS}|requirements|tests|understudy)/[\w./-]+\.\w+)`")
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def fences(page: Path, holds: str = "") -> list[str]:
    """A page's Python code."""
    return [code for code in FENCE.findall(page.read_text()) if holds in code]


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, fragment = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert fragment in [anchor(heading) for heading in headings], target


@each_page
def test_every_path_exists(page: Path) -> None:
    for path in PATH.findall(page.read_text()):
        assert (ROOT / path).exists(), path


@each_page
def test_every_command_and_target_exists(page: Path) -> None:
    text = page.read_text()
    commands = {entry.name for entry in entry_points(group="understudy.commands")}
    named = re.findall(r"(?:`|^ +)understudy ([a-z]+)", text, re.MULTILINE)
    assert set(named) <= commands
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^ +)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for entry in entry_points(group="understudy.commands"):
        assert f"`understudy {entry.name}`" in text


@each_page
def test_every_metric_is_declared(page: Path) -> None:
    declared = {
        exposed_name(value)
        for value in vars(metrics).values()
        if isinstance(value, MetricWrapperBase)
    }
    assert set(re.findall(r"`(understudy_\w+)`", page.read_text())) <= declared


@each_page
def test_every_key_exists(page: Path) -> None:
    for dotted in re.findall(
        r"(?:`|--set '?)((?:run|network|model|envserver|inference|actor|learner)(?:\.[a-z_]+)+)",
        page.read_text(),
    ):
        kind: object = Config
        for name in dotted.split("."):
            assert isinstance(kind, type), dotted
            fields = getattr(kind, "model_fields", {})
            # A run's folder and modules have dots as well; keys begin with a section's field.
            if kind is not Config and name not in fields:
                assert name in ("path", "py", "proto", "toml", "log"), dotted
                break
            kind = fields[name].annotation


@each_page
def test_python_code_compiles(page: Path) -> None:
    for code in fences(page):
        compile(code, str(page), "exec")


@each_page
def test_pages_are_plain(page: Path) -> None:
    text = page.read_text()
    assert text.isascii()
    wide = [
        line
        for line in text.splitlines()
        if len(line) > 105 and not line.lstrip().startswith(("|", "<!--"))
    ]
    assert wide == []


def test_the_readme_shows_the_example_environment_and_the_architecture() -> None:
    (shown,) = fences(ROOT / "README.md", "class WordCount")
    assert shown == (ROOT / "examples" / "word_count.py").read_text()
    picture = re.compile(r"^    envserver  <==.*?FSDP2\)$", re.MULTILINE | re.DOTALL)
    (in_readme,) = picture.findall((ROOT / "README.md").read_text())
    (in_docs,) = picture.findall((ROOT / "docs" / "architecture.md").read_text())
    assert in_readme == in_docs


async def test_the_readme_client_runs(tmp_path: Path) -> None:
    control = RoleControl("envserver")
    control.serving()
    servicer = EnvironmentServicer(load_suites(["practice"]), EnvserverConfig(), control)
    service = Service(
        name="understudy.v1.EnvironmentService",
        add=environment_pb2_grpc.add_EnvironmentServiceServicer_to_server,
        servicer=servicer,
    )
    (code,) = fences(ROOT / "README.md", "EnvironmentClient.connect")
    async with serving(service) as address:
        script = tmp_path / "client.py"
        script.write_text(code.replace("127.0.0.1:7200", address))
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, said.decode()
    assert said.decode().splitlines()[-1] == "0.0 True"


def generator() -> ModuleType:
    """docs/make_configuration.py as a module."""
    path = ROOT / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_what_its_generator_writes() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == generator().render(), "run python docs/make_configuration.py"


def test_the_generator_rewrites_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = generator()
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    module.main()
    assert (tmp_path / "page.md").read_text().startswith("# Configuration\n")
