"""The browser's tools on real pages in a real Chromium, and what hostile pages do not get."""

import asyncio
import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from browser_helpers import be_patient, needs_chromium, surfing
from envserver.tools import browser as browser_module
from envserver.tools import browser_process
from envserver.tools.pages import MAX_FILE_BYTES, ORIGIN, Pages


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


SHOP = """<!doctype html><title>Shop</title>
<h1>Lamps</h1><p hidden>secret</p><p style="visibility:hidden">unseen</p>
<a href="orders/list.html">Orders</a>
<table><tr><td>desk</td><td>12</td></tr><tr><td>floor</td><td>30</td></tr></table>
<form onsubmit="event.preventDefault();
  document.getElementById('out').textContent = 'sold ' + q.value + ' ' + kind.value + gift.checked">
<input id=q placeholder="How many">
<select id=kind><option>desk</option><option>floor</option></select>
<input type=checkbox id=gift><button>Buy</button></form><div id=out></div>"""
ORDERS = """<title>Orders</title>Nothing yet. <a href="../shop.html">Back to shop</a>
<a href="missing.html">Old</a> <a href="shop.html" target=_blank>Another window</a>"""


@needs_chromium
async def test_a_form_is_found_filled_and_sent(tmp_path: Path) -> None:
    async with surfing(tmp_path, {"shop.html": SHOP, "orders/list.html": ORDERS}) as surfer:
        text, outcome = await surfer.call("read")
        assert (text, outcome.ok) == ("No page is open; open one first.", False)
        assert await surfer.see("open", page="shop.html") == (
            "Shop | shop.html\nLamps\n[1 link: Orders]\ndesk | 12 |\nfloor | 30 |\n"
            "[2 field: How many] [3 list: desk of desk, floor] [4 checkbox: off] [5 button: Buy]"
        )
        assert "[2 field: 7]" in await surfer.see("type", number=2, text="7")
        assert "[3 list: floor of" in await surfer.see("type", number=3, text="floor")
        assert "[4 checkbox: on]" in await surfer.see("click", number=4)
        assert (await surfer.see("click", number=5)).endswith("\nsold 7 floortrue")
        orders = await surfer.see("click", number=1)
        assert orders.startswith("Orders | orders/list.html\nNothing yet. [1 link: Back to shop]")
        assert (await surfer.see("back")).startswith("Shop | shop.html")
        await surfer.see("click", number=1)
        assert "There is no such page." in await surfer.see("click", number=2)
        for name, arguments, said in [
            ("click", {"number": 99}, "No such number; read the page"),
            ("click", {}, "Wrong arguments; browser_click takes number."),
            ("type", {"number": "1", "text": "x"}, "Wrong type; number is an integer."),
            ("read", {"part": 7}, "No such part; there are 1."),
            ("open", {"page": "no.html"}, "No such page; name a file of the task"),
        ]:
            text, outcome = await surfer.call(name, **arguments)
            assert text.startswith(said)
            assert not outcome.ok


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and what reaches it."""
    reached: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", reached
    finally:
        server.shutdown()
        server.server_close()


def _hostile(address: str) -> str:
    attempts = f"""
      "fetch": () => fetch("http://{address}/fetch", {{mode: "no-cors"}}),
      "beacon": () => navigator.sendBeacon("http://{address}/beacon", "x") ? 0 : Promise.reject(),
      "file": () => fetch("file:///etc/passwd"),
      "image": () => new Promise((ok, no) => {{
        const image = new Image(); image.onload = ok; image.onerror = no;
        image.src = "http://{address}/image"; }}),
      "socket": () => new Promise((ok, no) => {{
        const socket = new WebSocket("ws://{address}/socket");
        socket.onmessage = ok; socket.onclose = no; socket.onerror = no; }}),
      "rtc": () => new Promise(async (ok, no) => {{
        const peer = new RTCPeerConnection({{iceServers: [{{urls: "stun:{address}"}}]}});
        peer.onicecandidate = (e) => e.candidate
          ? (/srflx|([0-9]+\\.){{3}}/.test(e.candidate.candidate) ? ok() : 0) : no();
        peer.createDataChannel("x"); await peer.setLocalDescription(await peer.createOffer()); }}),
      "worker": () => navigator.serviceWorker.register("worker.js").then((r) =>
        new Promise((ok, no) => setTimeout(() => r.active ? ok() : no(), 1500))),
      "window": () => {{ const w = window.open("http://{address}/window"); return w && 0; }},
      "out": () => fetch("../../../../etc/passwd").then((r) => r.ok || Promise.reject()),
      "link": () => fetch("link.txt").then((r) => r.ok || Promise.reject()),
      "post": () => fetch("index.html", {{method: "POST"}}).then((r) => r.ok || Promise.reject()),
    """
    return f"""<!doctype html><title>{"T" * 5000}</title><body>
      <iframe src="http://{address}/frame"></iframe><iframe src="file:///etc/passwd"></iframe>
      <object data="http://{address}/object"></object><img src="//{address}/img">
      <a href="http://{address}/away">away</a> <a href="file:///etc/passwd">passwd</a>
      <a href="data.bin" download>download</a> <a href="javascript:alert(prompt('x'))">ask</a>
      <pre id=out>waiting</pre><script>
      const attempts = {{{attempts}}};
      const limit = () => new Promise((ok, no) => setTimeout(no, 3000));
      Promise.all(Object.entries(attempts).map(async ([name, attempt]) => {{
        try {{ await Promise.race([attempt(), limit()]); return name; }} catch {{ return null; }}
      }})).then((names) => {{ out.textContent = "got " + JSON.stringify(names); }});
      </script>"""


@needs_chromium
async def test_a_hostile_page_reaches_nothing(tmp_path: Path) -> None:
    with listening() as (address, reached):
        pages = {"index.html": _hostile(address), "worker.js": "", "data.bin": "x"}
        async with surfing(tmp_path, pages) as surfer:
            (tmp_path / "link.txt").symlink_to("/etc/passwd")
            text = await surfer.see("open", page="index.html")
            for _ in range(200):
                if "got " in (text := await surfer.see("read")):
                    break
                await asyncio.sleep(0.3)
            # Both only say that a request was handed over; what came of it is `reached`.
            got = json.loads(text.rpartition("got ")[2])
            assert {name for name in got if name} <= {"beacon", "window"}, text
            assert len(text) < 2_000
            assert "root:" not in text
            assert "none of the task's pages" in await surfer.see("click", number=1)
            await surfer.see("back")
            for number in (2, 3, 4):
                text, _ = await surfer.call("click", number=number)
                assert "root:" not in text
            assert (await surfer.see("open", page="index.html")).startswith("TTT")
            process = surfer.browser._process
            assert process
            assert len(process.page.context.pages) == 1
        assert reached == []


@needs_chromium
async def test_the_box_holds_without_the_routes(tmp_path: Path) -> None:
    """Were a page to get round what Playwright intercepts, there is no network and no file."""
    with listening() as (address, reached):
        async with surfing(tmp_path, {"index.html": "Hi"}) as surfer:
            await surfer.see("open", page="index.html")
            process = surfer.browser._process
            assert process
            assert process.page.context.browser
            bare = await process.page.context.browser.new_page()
            for url in (
                f"http://{address}/",
                "file:///etc/passwd",
                f"file://{tmp_path}/index.html",
            ):
                with pytest.raises(Exception, match="net::ERR_"):
                    await bare.goto(url)
            await bare.close()
            box = psutil.Process(process.pid).children(recursive=True)
            ours = _Confinement.of(psutil.Process())
            chromium = [
                confined
                for confined in map(_Confinement.of, box)
                if confined and confined.words.startswith(browser_process.CHROMIUM)
            ]
            renderers = [each for each in chromium if "--type=renderer" in each.words]
            assert ours
            assert renderers
            for each in chromium:
                assert each.user != 0 or os.geteuid() != 0
                assert each.status["NoNewPrivs"] == "1"
                assert each.network != ours.network
            for each in renderers:  # Chromium's own sandbox holds beside the box
                assert each.status["Seccomp"] == "2"
                assert each.users != ours.users
            first = next(each for each in chromium if "--type" not in each.words)
            assert set(first.process.environ()) == {"HOME", "PATH", "LANG", "PWD"}
        assert reached == []
    gone, alive = psutil.wait_procs(box, timeout=20)
    assert not alive
    assert gone


class _Confinement(NamedTuple):
    """What a process may do: its command line, real user, /proc's status and two namespaces."""

    process: psutil.Process
    words: str
    user: int
    status: dict[str, str]
    network: str
    users: str

    @classmethod
    def of(cls, process: psutil.Process) -> "_Confinement | None":
        """None of a process that ended meanwhile, as a closed page's renderer does."""
        proc = Path(f"/proc/{process.pid}")
        try:
            lines = (line.split() for line in (proc / "status").read_text().splitlines())
            return cls(
                process=process,
                words=" ".join(process.cmdline()),
                user=process.uids().real,
                status={name.rstrip(":"): " ".join(values) for name, *values in lines},
                network=os.readlink(proc / "ns/net"),
                users=os.readlink(proc / "ns/user"),
            )
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return None


LOOP = "<title>Loop</title><button onclick='while (true) {}'>Go</button>"
HOG = """<title>Hog</title><button onclick='const all = [];
  setInterval(() => all.push(new Uint8Array(2 ** 25).fill(1)), 20)'>Go</button>"""


@needs_chromium
async def test_a_page_that_never_ends_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with surfing(tmp_path, {"loop.html": LOOP, "hog.html": HOG}) as surfer:
        await surfer.see("open", page="loop.html")
        with monkeypatch.context() as patch:
            patch.setattr(browser_module, "CALL_SECONDS", 3.0)
            patch.setattr(browser_module, "_ACTION_SECONDS", 60.0)
            text, outcome = await surfer.call("click", number=1)
        assert text.startswith("Stopped: a call may take")
        assert outcome.limit == "time"
        await surfer.see("open", page="hog.html")
        for _ in range(100):
            text, outcome = await surfer.call("click", number=1)
            if not outcome.ok:
                break
            await asyncio.sleep(0.3)
        assert outcome.limit == "memory", text
        assert text.startswith("Stopped: the page needed more than 1024 MiB.")
        assert (await surfer.see("open", page="loop.html")).startswith("Loop")


@needs_chromium
async def test_a_loop_between_calls_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_process, "CPU_SECONDS", 3.0)
    later = "<title>Later</title><script>setTimeout(() => { while (true) {} }, 500)</script>"
    async with surfing(tmp_path, {"later.html": later}) as surfer:
        await surfer.call("open", page="later.html")
        process = surfer.browser._process
        assert process
        for _ in range(300):
            if not psutil.pid_exists(process.pid):
                break
            await asyncio.sleep(0.1)
        text, outcome = await surfer.call("read")
        assert (text[:8], outcome.limit) == ("Stopped:", "time")


@needs_chromium
async def test_long_and_lying_pages_are_bounded(tmp_path: Path) -> None:
    pages = {
        "long.html": "<title>Long</title>" + "<p>word word</p>" * 10_000,
        "links.html": "<a href=x>a</a>" * 5_000,
        "lies.html": """<title>Lies</title><p>true</p><script>
            Array.prototype.push = () => { throw 1 }; Array.prototype.join = () => 7;
            String.prototype.slice = () => "x".repeat(1e8);
            window.getComputedStyle = () => null;</script>""",
        "<b>&\u00e9 %41.html": "<title>Name</title>odd",
    }
    async with surfing(tmp_path, pages) as surfer:
        first = await surfer.see("open", page="long.html")
        assert first.startswith("[part 1 of 9]\nLong | long.html\nword word\n")
        assert len(first) < 13_000
        assert (await surfer.see("read", part=9)).startswith("[part 9 of 9]")
        text, outcome = await surfer.call("open", page="lies.html")
        assert (text.startswith("The page did not do that"), outcome.ok) == (True, False)
        links = [await surfer.see("open", page="links.html"), await surfer.see("read", part=2)]
        assert "[1000 link: a]" in "".join(links)
        assert "[1001 link" not in "".join(links)
        assert "odd" in await surfer.see("open", page="<b>&\u00e9 %41.html")


@needs_chromium
async def test_episodes_share_nothing(tmp_path: Path) -> None:
    keep = """<title>Keep</title><p id=out></p><script>
      out.textContent = "kept " + localStorage.getItem("note") + document.cookie;
      localStorage.setItem("note", "mine"); document.cookie = "note=mine";</script>"""
    async with surfing(tmp_path, {"keep.html": keep}) as one, surfing(tmp_path, {}) as other:
        seen = await asyncio.gather(*(s.see("open", page="keep.html") for s in (one, other)))
        assert all("kept null" in text for text in seen)
        assert "kept minenote=mine" in await one.see("open", page="keep.html")


def test_a_folder_gives_its_own_files_only(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.html").write_text("in")
    (tmp_path / "secret.html").write_text("out")
    (folder / "link.html").symlink_to(tmp_path / "secret.html")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.html")
    with (folder / "large.html").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    pages = Pages(folder)
    page = pages.read(pages.address("sub/a b.html"))
    assert page
    assert (page.body, page.content_type) == (b"in", "text/html; charset=utf-8")
    assert pages.name(pages.address("sub/a b.html")) == "sub/a b.html"
    for name in ("", "sub", "../secret.html", "link.html", "up/secret.html", "pipe.html", "a\0b",
                 "large.html", "sub/../../secret.html", "./sub/a b.html", "\ud800"):  # fmt: skip
        try:
            address = pages.address(name)
        except UnicodeEncodeError:
            continue
        assert pages.read(address) is None, name
    for address in ("file:///etc/passwd", "http://pages.test.evil/sub/a%20b.html", "about:blank",
                    f"{ORIGIN}:80/sub/a%20b.html", f"{ORIGIN}/..%2fsecret.html",
                    f"{ORIGIN}//etc/passwd"):  # fmt: skip
        assert pages.read(address) is None, address


async def test_without_chromium_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_process, "CHROMIUM", "/no/such/chromium")
    with pytest.raises(RuntimeError, match="/no/such/chromium is not there; apt-get install"):
        browser_module.Browser(tmp_path)
