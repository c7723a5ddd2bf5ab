"""The tools' observations, and what is refused."""

import io
import zipfile
from collections.abc import Callable

import docx
import openpyxl
import pptx
import pytest
from PIL import Image

from envserver.environment import ToolCall, ToolOutcome
from envserver.tools import (
    Calculator,
    Corpus,
    Document,
    OpenPage,
    PythonTool,
    ReadFile,
    Search,
    Toolbox,
)
from envserver.tools.tool import MAX_CHARS
from sandbox_helpers import needs_bwrap, open_workspace

MIB = 2**20


async def ask(toolbox: Toolbox, tool: str, /, **arguments: object) -> tuple[str, ToolOutcome]:
    """One call's observation and outcome."""
    messages, outcomes = await toolbox.call([ToolCall(name=tool, arguments=arguments)])
    assert messages[0].role == "tool"
    return messages[0].content, outcomes[0]


def _xlsx() -> bytes:
    book = openpyxl.Workbook()
    book.active.title = "Sales"
    book.active.append(["item", "price"])
    book.active.append(["lamp", 12.5])
    return _saved(book.save)


def _docx() -> bytes:
    document = docx.Document()
    document.add_paragraph("First")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "a", "b"
    document.add_paragraph("Last")
    return _saved(document.save)


def _pptx() -> bytes:
    show = pptx.Presentation()
    slide = show.slides.add_slide(show.slide_layouts[1])
    slide.shapes.title.text = "Title"
    slide.notes_slide.notes_text_frame.text = "Aside"
    return _saved(show.save)


def _png() -> bytes:
    return _saved(lambda file: Image.new("RGB", (4, 3)).save(file, format="PNG"))


def _pdf() -> bytes:
    """A page with one line of text; readers rebuild the table of contents that it lacks."""
    text = b"BT /F1 12 Tf 9 9 Td (Hello page) Tj ET"
    parts = (
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R"
        b"/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(text), text),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    )
    objects = b"".join(b"%d 0 obj%s endobj\n" % (n, part) for n, part in enumerate(parts, 1))
    return b"%PDF-1.4\n" + objects + b"trailer<</Root 1 0 R/Size 6>>\nstartxref\n0\n%%EOF"


def _saved(save: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "a.txt": ("\ufeffGr\u00fc\u00dfe".encode(), "Gr\u00fc\u00dfe"),
    "a.csv": (b'item;note\nlamp;"a; b"\n', "item\tnote\nlamp\ta; b"),
    "a.json": (b'{"a": [1]}', '{\n "a": [\n  1\n ]\n}'),
    "a.xml": (b"<a><b>1</b></a>", "<a>\n  <b>1</b>\n</a>"),
    "a.html": (b"<h1>Hi</h1><script>x()</script><p>there", "Hi\nthere"),
    "a.xlsx": (_xlsx(), "# Sales\nitem\tprice\nlamp\t12.5"),
    "a.docx": (_docx(), "First\na\tb\nLast"),
    "a.pptx": (_pptx(), "# Slide 1\nTitle\n\nNotes: Aside"),
    "a.pdf": (_pdf(), "# Page 1\nHello page"),
    "a.png": (_png(), "PNG, 4 x 3 pixels, mode RGB"),
    "a.zip": (_zip({"b/c.txt": b"inner"}), "b/c.txt\t5 bytes"),
}


@needs_bwrap
async def test_every_kind_of_file_is_read() -> None:
    async with open_workspace({name: data for name, (data, _) in FILES.items()}) as space:
        tools = Toolbox(ReadFile(space))
        found = {name: (await ask(tools, "read_file", file=name))[0] for name in FILES}
        assert found == {name: text for name, (_, text) in FILES.items()}
        assert (await ask(tools, "read_file", file="a.zip/b/c.txt"))[0] == "inner"


BILLION_LAUGHS = b'<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><a>&c;</a>'
OUTSIDE = b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///worker/worker.py">]><a>&b;</a>'
REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb.zip/zeros.txt": (_zip({"zeros.txt": bytes(100 * MIB)}), "unpacks to more than"),
    "bomb.xlsx": (_zip({"xl/workbook.xml": bytes(100 * MIB)}), "unpacks to more than"),
    "bomb.docx": (_zip({f"{n}.xml": bytes(10 * MIB) for n in range(9)}), "unpacks to more than"),
    "laughs.xml": (BILLION_LAUGHS, "EntitiesForbidden"),
    "outside.xml": (OUTSIDE, "EntitiesForbidden"),
    "../worker/worker.txt": (b"", "outside the folder"),
    "/etc/ld.so.txt": (b"", "outside the folder"),
    "link.txt": (b"", "outside the folder"),
    "absent.txt": (b"", "no such file"),
    "damaged.pdf": (b"%PDF-1.4 nothing", "Cannot be read"),
    "damaged.xlsx": (b"PK nothing", "not a zip file"),
    "deep.json": (b"[" * 10**6, "RecursionError"),
}


@needs_bwrap
async def test_files_that_attack_their_reader_are_refused() -> None:
    files = {name.partition("/")[0]: data for name, (data, _) in REFUSED.items() if data}
    async with open_workspace(files) as space:
        tools = Toolbox(ReadFile(space), PythonTool(space))
        link = "import os; os.symlink('/usr/lib/os-release', 'link.txt')"
        assert (await ask(tools, "python", code=link))[1].ok
        for name, (_, reason) in REFUSED.items():
            text, outcome = await ask(tools, "read_file", file=name)
            assert (reason in text, outcome.ok) == (True, False), (name, text)
        assert (await ask(tools, "python", code="'alive'"))[0] == "'alive'\n"


@needs_bwrap
async def test_long_files_are_read_in_parts() -> None:
    async with open_workspace({"long.txt": b"abcd" * 7000, "note.txt": b""}) as space:
        tools = Toolbox(ReadFile(space))
        second, _ = await ask(tools, "read_file", file="long.txt", part=3)
        assert second == "[part 3 of 3]\n" + "abcd" * 1000
        for part in (0, 4, -1):
            text, outcome = await ask(tools, "read_file", file="long.txt", part=part)
            assert (text, outcome.ok) == ("No such part; there are 3.", False)
        assert (await ask(tools, "read_file", file="note.txt"))[0] == "(empty)"
        text, _ = await ask(tools, "read_file", file="a.exe")
        assert text.startswith("Unknown kind of file; use one of .csv, ")


@needs_bwrap
async def test_python_says_what_ended_it_and_long_output_is_shortened() -> None:
    async with open_workspace() as space:
        tools = Toolbox(PythonTool(space))
        text, outcome = await ask(tools, "python", code="x = bytearray(2**31)")
        assert outcome == ToolOutcome(name="python", ok=False, limit="memory")
        assert text.splitlines()[-1].startswith("Stopped: it needed more than 512 MiB of memory.")
        text, outcome = await ask(tools, "python", code="1 / 0")
        assert (outcome.ok, outcome.limit) == (False, "")
        text, _ = await ask(tools, "python", code="print('a' * 50_000)")
        assert len(text) < MAX_CHARS + 100
        assert "characters left out" in text
        assert (await ask(tools, "python", code="pass"))[0] == "(no output)"


PAGES = [
    Document(address="doc/1", title="Lamps", text="A lamp gives light. " * 900),
    Document(address="doc/2", title="Boats", text="A boat floats on water, and has a lamp."),
]


async def test_search_finds_pages_and_reads_them() -> None:
    corpus = Corpus(PAGES)
    tools = Toolbox(Search(corpus), OpenPage(corpus))
    text, _ = await ask(tools, "search", query="boats")
    assert text == "doc/2 | Boats\n  A boat floats on water, and has a lamp."
    assert (await ask(tools, "search", query='lamp OR ) " NEAR(\ud800'))[1].ok
    assert (await ask(tools, "search", query="zebra"))[0] == "Nothing found; try other words."
    assert (await ask(tools, "open_page", address="doc/2"))[0] == PAGES[1].text
    text, _ = await ask(tools, "open_page", address="doc/1", part=2)
    assert text.startswith("[part 2 of 2]\n")
    for address in ("doc/3", "\ud800", "file:///etc/passwd"):
        assert "No such page" in (await ask(tools, "open_page", address=address))[0]
    corpus.close()


async def test_a_corpus_in_a_file_is_kept(tmp_path) -> None:
    path = str(tmp_path / "corpus.db")
    Corpus(PAGES, path).close()
    kept = Corpus(path=path)
    assert [hit.address for hit in await kept.search("water", 5)] == ["doc/2"]
    kept.close()


@pytest.mark.parametrize(
    ("name", "arguments", "text", "counted"),
    [
        ("calculate", {"expression": "6 * 7"}, "42", None),
        ("calculate", {"expression": "1 / 0"}, "Division by zero.", None),
        ("calculate", {}, "Wrong arguments; calculate takes expression.", None),
        ("calculate", {"expression": 1}, "Wrong type; expression is a string.", None),
        (
            "open_page",
            {"address": "a", "part": True},
            "Wrong type; part is an integer.",
            "open_page",
        ),
        ("open_page", {"part": 1}, "Wrong arguments; open_page takes address, part.", "open_page"),
        ("shell", {}, "Unknown tool; use calculate, open_page.", "unknown"),
    ],
)
async def test_calls_are_checked_against_the_schemas(name, arguments, text, counted) -> None:
    observation, outcome = await ask(Toolbox(Calculator(), OpenPage(Corpus())), name, **arguments)
    assert (observation, outcome.name, outcome.ok) == (text, counted or name, text == "42")
