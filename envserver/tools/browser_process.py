"""Headless Chromium in a box, one for each episode, driven by Playwright.

    bwrap       no network, none of the host's files but programs, libraries and fonts, a user of
                its own or a user namespace, no rights, one tmpfs to write to
    Chromium    its own sandbox within: renderers in namespaces and system call filters of theirs
    this side   every request is answered from the task's folder or refused

The driver is Playwright's own process, outside of the box; it speaks with Chromium over pipes.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from envserver.sandbox import Layout, Outcome
from envserver.sandbox.layout import system_mounts
from envserver.sandbox.usage import measure, private_bytes
from envserver.tools.pages import Pages

if TYPE_CHECKING:
    from playwright.async_api import Page, Playwright, Route

CHROMIUM = "/usr/lib/chromium/chromium"
"""Debian's; /usr/bin/chromium is a script around it."""
START_SECONDS = 60.0
"""Time that a start may take; far above 3 s, for machines that are overloaded."""
MEMORY_BYTES = 2**30
"""Memory of all of an episode's Chromium."""
CPU_SECONDS = 20.0
"""CPU time of all its processes from one call to the next."""
MAX_TASKS = 1_000
"""Processes and threads; Chromium has about 100 by itself."""
DISK_BYTES = 128 * 2**20
"""Of the one place to write, in memory."""
LOOK_SECONDS = 0.2
_FONTS = ("/usr/share/fonts", "/usr/share/fontconfig", "/etc/fonts")
_FLAGS = """
--headless --remote-debugging-pipe --no-first-run --no-default-browser-check --disable-gpu
--disable-extensions --disable-background-networking --disable-component-update --disable-sync
--disable-breakpad --disable-dev-shm-usage --disable-default-apps --mute-audio
--disable-back-forward-cache --password-store=basic --renderer-process-limit=2
--js-flags=--max-old-space-size=256
"""


def missing() -> str | None:
    """What has to be installed before a browser can be used; None if nothing."""
    if not os.access(CHROMIUM, os.X_OK):
        return f"{CHROMIUM} is not there; apt-get install chromium"
    if next(Path(_FONTS[0]).rglob("*.tt[fc]"), None) is None:
        return "Chromium shows nothing without fonts; apt-get install fonts-liberation"
    if not shutil.which("bwrap"):
        return "bwrap is not installed; apt-get install bubblewrap"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed; pip install 'understudy[browser]'"
    return None


def command(layout: Layout, profile: str) -> list[str]:
    """What to execute for one more Chromium, with a profile at a path of the box's."""
    mounts = system_mounts()
    mounts += ["--dir", "/usr/share"]  # bwrap would make it for its own user only
    for path in _FONTS:
        mounts += ["--ro-bind-try", path, path]
    mounts += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    mounts += ["--perms", "1777", "--size", str(DISK_BYTES), "--tmpfs", "/box"]
    mounts += ["--symlink", "/box", "/tmp", "--remount-ro", "/", "--chdir", "/box"]
    flags = [*_FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
    isolation = ["--new-session", *layout.isolation(nested=True)]
    box = ["bwrap", *isolation, *mounts, "--", *layout.change_user()]
    limits = ["prlimit", "--core=0", f"--fsize={DISK_BYTES}", "--memlock=0", "--"]
    return [*box, *limits, CHROMIUM, *flags, "about:blank"]


class BrowserProcess:
    """One Chromium with one page; it lives until a limit or `close` ends it."""

    def __init__(self, playwright: "Playwright", page: "Page", pid: int) -> None:
        self.page = page
        self.outcome = Outcome.OK
        """What ended it; OK while it lives."""
        self.pid = pid
        """Of the box, on the host."""
        self._playwright = playwright
        self._cpu_seconds = 0.0
        self._watch = asyncio.create_task(self._look())

    @classmethod
    async def start(cls, layout: Layout, pages: Pages) -> "BrowserProcess":
        """Start one that sees the pages and nothing else. Raises OSError if it does not start."""
        from playwright.async_api import Error, async_playwright

        playwright = await async_playwright().start()
        profile = f"/box/{uuid.uuid4().hex}"
        program, *arguments = command(layout, profile)
        try:
            browser = await playwright.chromium.launch(
                executable_path=shutil.which(program),
                args=arguments,
                ignore_default_args=True,
                env={},
                timeout=START_SECONDS * 1000,
                handle_sigint=False,
                handle_sigterm=False,
                handle_sighup=False,
            )
            context = await browser.new_context(service_workers="block", accept_downloads=False)
            await context.route("**/*", _Answers(pages).answer)
            await context.route_web_socket("**/*", lambda socket: socket.close())
            page = await context.new_page()
            context.on("page", lambda other: other.close() if other is not page else None)
            pid = _find(profile)
        except BaseException as error:  # a cancelled start, too, has to end the driver
            await playwright.stop()
            if isinstance(error, Error):
                raise OSError(f"Chromium did not start: {error}") from error
            raise
        process = cls(playwright, page, pid)
        for event in ("crash", "close"):
            page.on(event, lambda _: process.end(Outcome.ERROR))
        return process

    def begin_call(self) -> None:
        """A call begins: CPU time is counted from here."""
        self._cpu_seconds = measure(self.pid).cpu_seconds

    def end(self, outcome: Outcome) -> None:
        """Kill all of it for a reason."""
        if self.outcome is Outcome.OK:
            self.outcome = outcome
            for pid in reversed(measure(self.pid).pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def close(self) -> None:
        """End it, and the driver."""
        self._watch.cancel()
        self.end(Outcome.ERROR)
        await self._playwright.stop()

    async def _look(self) -> None:
        """End it where it uses more than it may."""
        while self.outcome is Outcome.OK:
            used = measure(self.pid)
            if not used.pids:
                self.outcome = Outcome.ERROR
            elif used.tasks > MAX_TASKS:
                self.end(Outcome.PROCESSES)
            elif used.cpu_seconds - self._cpu_seconds > CPU_SECONDS:
                self.end(Outcome.TIME)
            elif used.resident_bytes > MEMORY_BYTES < private_bytes(used.pids):
                self.end(Outcome.MEMORY)
            await asyncio.sleep(LOOK_SECONDS)


class _Answers:
    """Answers a browser's requests from a folder, and refuses all others."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def answer(self, route: "Route") -> None:
        """One request. The page that asked may be gone meanwhile."""
        from playwright.async_api import Error

        with contextlib.suppress(Error):
            await self._answer(route)

    async def _answer(self, route: "Route") -> None:
        request = route.request
        page = self._pages.read(request.url) if request.method == "GET" else None
        if page:
            await route.fulfill(body=page.body, content_type=page.content_type)
        elif self._pages.name(request.url) is None:
            await route.abort("blockedbyclient")
        else:
            await route.fulfill(
                status=404, body="There is no such page.", content_type="text/plain"
            )


def _find(profile: str) -> int:
    """The box's process, which Playwright does not tell: the topmost that names the profile."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(profile in word for word in process.cmdline()):
                return process.pid
    raise OSError("Chromium ended as it started")
