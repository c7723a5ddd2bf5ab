"""A browser for the pages of a task's folder: headless Chromium, which reaches nothing else.

Five tools share an episode's browser. Each answers with the page as text, in which links, buttons
and fields are numbered, so that the policy can name them:

    Orders | orders.html
    [1 link: Home] Overview
    Search for [2 field: ] [3 button: Go]
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envserver.sandbox import Layout, Outcome
from envserver.tools.browser_process import CPU_SECONDS, MEMORY_BYTES, BrowserProcess, missing
from envserver.tools.pages import Pages
from envserver.tools.search import cut
from envserver.tools.tool import Observation, Tool, describe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from playwright.async_api import ElementHandle, JSHandle, Page

CALL_SECONDS = 15.0
"""Wall time of a call; the browser is ended after it."""
_ACTION_SECONDS = 5.0
"""Time that one click, text or page may take before the policy is told that it did not work."""
_SETTLE_SECONDS = 0.2
"""What scripts get to do their work after a click or a text."""
MAX_PAGE_CHARS = 120_000
MAX_CONTROLS = 1_000
MAX_TYPED_CHARS = 2_000
_PART = {"part": {"type": "integer", "description": "Which part of a long page, from 1"}}
_VIEW = Path(__file__).with_name("browser_view.js").read_text(encoding="utf-8")


class Browser:
    """An episode's browser. It starts with the first call, and anew after a limit has ended it."""

    def __init__(self, pages: Path) -> None:
        """Take the folder that its pages lie in.

        Raises RuntimeError, with the remedy, where Chromium, Playwright or bubblewrap is missing.
        """
        if lacks := missing():
            raise RuntimeError(lacks)
        self._layout = Layout.find()
        self._pages = Pages(pages)
        self._process: BrowserProcess | None = None
        self._controls: JSHandle | None = None

    @property
    def tools(self) -> "list[Tool]":
        """The five tools, for a Toolbox."""
        return [kind(self) for kind in (OpenFile, ReadPage, Click, TypeText, GoBack)]

    async def act(self, action: "Callable[[Page], Awaitable[None]]", part: int = 1) -> Observation:
        """Do something to the page, and show what it is then.

        Raises ValueError, with a remedy, where the page does not do it.
        """
        from playwright.async_api import Error

        if self._process and self._process.outcome is not Outcome.OK:
            return await self._end(self._process.outcome)
        if self._process is None:
            self._process = await BrowserProcess.start(self._layout, self._pages)
        process = self._process
        try:
            async with asyncio.timeout(CALL_SECONDS):
                process.begin_call()
                await action(process.page)
                return Observation(text=cut(await self._view(process.page), part))
        except TimeoutError:
            return await self._end(Outcome.TIME)
        except Error as error:
            if process.outcome is not Outcome.OK:
                return await self._end(process.outcome)
            raise ValueError(_explain(error)) from None
        except asyncio.CancelledError:
            process.end(Outcome.ERROR)
            raise

    async def open(self, name: str) -> Observation:
        """Open a file of the folder."""
        address = self._pages.address(name)
        if self._pages.read(address) is None:
            raise ValueError("No such page; name a file of the task, such as index.html.")

        async def go(page: "Page") -> None:
            await page.goto(address, timeout=_ACTION_SECONDS * 1000)

        return await self.act(go)

    async def control(self, number: int) -> "ElementHandle":
        """A link, button or field of the page as it was shown last. Raises ValueError."""
        if self._controls is None:
            raise ValueError("No page is open; open one first.")
        element = (await self._controls.get_property(str(number))).as_element()
        if element is None:
            raise ValueError("No such number; read the page for what there is.")
        return element

    async def close(self) -> None:
        """End the browser."""
        self._controls = None
        if self._process:
            process, self._process = self._process, None
            await process.close()

    async def _view(self, page: "Page") -> str:
        name = self._pages.name(page.url)
        if name is None:
            self._controls = None
            return "This is none of the task's pages, and nothing else can be reached; open one."
        seen = await page.evaluate_handle(_VIEW, [MAX_PAGE_CHARS, MAX_CONTROLS])
        text = str(await (await seen.get_property("text")).json_value())[:MAX_PAGE_CHARS]
        self._controls = await seen.get_property("controls")
        return f"{(await page.title())[:200]} | {name}\n{text}".strip()

    async def _end(self, outcome: Outcome) -> Observation:
        await self.close()
        reason = {
            Outcome.TIME: f"a call may take {CALL_SECONDS:g} s, its CPU {CPU_SECONDS:g} s",
            Outcome.MEMORY: f"the page needed more than {MEMORY_BYTES // 2**20} MiB",
        }.get(outcome, "the browser ended")
        text = f"Stopped: {reason}. Open a page again; what was typed is lost."
        return Observation(text=text, outcome=outcome)


class _BrowserTool(Tool):
    def __init__(self, browser: Browser) -> None:
        """Take the episode's browser."""
        self._browser = browser


class OpenFile(_BrowserTool):
    """Opens a page."""

    spec = describe(
        "browser_open",
        "Open a page of the task in the browser.",
        page="File name, for example index.html",
    )

    async def call(self, **arguments: Any) -> Observation:
        """The page's text, with numbered links, buttons and fields."""
        return await self._browser.open(arguments["page"])


class ReadPage(_BrowserTool):
    """Shows the page that is open."""

    spec = describe("browser_read", "Read the page that is open.", optional=_PART)

    async def call(self, **arguments: Any) -> Observation:
        """One part of the page's text."""

        async def stay(page: "Page") -> None:
            if page.url == "about:blank":
                raise ValueError("No page is open; open one first.")

        return await self._browser.act(stay, arguments.get("part", 1))


class Click(_BrowserTool):
    """Clicks a link or a button."""

    spec = describe(
        "browser_click",
        "Click a link, button or field of the page.",
        integers={"number": "Its number on the page"},
    )

    async def call(self, **arguments: Any) -> Observation:
        """The page after the click."""

        async def click(page: "Page") -> None:
            element = await self._browser.control(arguments["number"])
            await element.click(timeout=_ACTION_SECONDS * 1000)
            await _settle(page)

        return await self._browser.act(click)


class TypeText(_BrowserTool):
    """Fills a field."""

    spec = describe(
        "browser_type",
        "Replace what a field of the page holds, or choose an option of a list.",
        text="What to type",
        integers={"number": "The field's number on the page"},
    )

    async def call(self, **arguments: Any) -> Observation:
        """The page with what was typed."""
        text = arguments["text"].encode("utf-8", "replace").decode()
        if len(text) > MAX_TYPED_CHARS:
            raise ValueError(f"Type at most {MAX_TYPED_CHARS} characters.")

        async def fill(page: "Page") -> None:
            element = await self._browser.control(arguments["number"])
            timeout = _ACTION_SECONDS * 1000
            if await element.evaluate("element => element.tagName") == "SELECT":
                await element.select_option(label=text, timeout=timeout)
            else:
                await element.fill(text, timeout=timeout)
            await _settle(page)

        return await self._browser.act(fill)


class GoBack(_BrowserTool):
    """Goes to the page before."""

    spec = describe("browser_back", "Go back to the page before.")

    async def call(self, **arguments: Any) -> Observation:
        """The page before."""

        async def back(page: "Page") -> None:
            if await page.evaluate("history.length") > 1:
                await page.go_back(timeout=_ACTION_SECONDS * 1000)

        return await self._browser.act(back)


async def _settle(page: "Page") -> None:
    await asyncio.sleep(_SETTLE_SECONDS)
    await page.wait_for_load_state("load", timeout=_ACTION_SECONDS * 1000)


def _explain(error: Exception) -> str:
    """A sentence of ours: what Playwright says has the page's own words in it."""
    if type(error).__name__ == "TimeoutError":
        return "The page did not do that in time; read it, or try something else."
    return "The page did not do that; read it, or try something else."
