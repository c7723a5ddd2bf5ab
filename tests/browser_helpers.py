"""What tests of the browser share."""

import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from envserver.environment import ToolCall, ToolOutcome
from envserver.tools import Browser, Toolbox, browser, browser_process
from envserver.tools.browser_process import missing

LACKS = missing()
needs_chromium = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
if LACKS:
    warnings.warn(f"{LACKS}: the browser is NOT TESTED", stacklevel=1)


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of time for busy machines; tests of limits set their own."""
    monkeypatch.setattr(browser, "CALL_SECONDS", 60.0)
    monkeypatch.setattr(browser, "_ACTION_SECONDS", 30.0)
    monkeypatch.setattr(browser_process, "CPU_SECONDS", 60.0)


class Surfer:
    """Calls the tools as a policy would."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.toolbox = Toolbox(*browser.tools)

    async def call(self, name: str, **arguments: object) -> tuple[str, ToolOutcome]:
        """One call of `browser_NAME`: its observation and outcome."""
        call = ToolCall(name=f"browser_{name}", arguments=arguments)
        messages, outcomes = await self.toolbox.call([call])
        return messages[0].content, outcomes[0]

    async def see(self, name: str, **arguments: object) -> str:
        """What an action that works shows."""
        text, outcome = await self.call(name, **arguments)
        assert outcome.ok, text
        return text


@asynccontextmanager
async def surfing(folder: Path, pages: Mapping[str, str]) -> AsyncIterator[Surfer]:
    """A browser over a folder with pages."""
    for name, html in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html)
    opened = Browser(folder)
    try:
        yield Surfer(opened)
    finally:
        await opened.close()
