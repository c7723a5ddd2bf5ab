"""File readers: bytes of many kinds to text, by well-kept libraries, inside a box.

Whatever a file does to its parser, it does in here. What parsers are known to fall for is refused
all the same: links that lead out of the folder, archives that unpack to more than MAX_BYTES.
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

FOLDER = "/box"
MAX_BYTES = 32 * 2**20
"""Of a file, of a member of an archive, and of all parts of an Office document together."""


def read(path: str, kind: str) -> str:
    """The text of a file in the folder, or of `archive.zip/member`.

    Raises ValueError for what is refused, and whatever a library raises for what it cannot read.
    """
    archive, separator, member = path.partition(".zip/")
    if not separator:
        with _open(path) as file:
            return READERS[kind](file)
    with _open(archive + ".zip") as file, zipfile.ZipFile(file) as opened:
        return READERS[kind](io.BytesIO(_unpack(opened, member)))


def _open(path: str) -> BinaryIO:
    real = os.path.realpath(os.path.join(FOLDER, path))
    if os.path.commonpath([real, FOLDER]) != FOLDER:
        raise ValueError("the file is outside the folder")
    if not os.path.isfile(real):
        raise ValueError("there is no such file")
    if os.path.getsize(real) > MAX_BYTES:
        raise ValueError(f"the file is larger than {MAX_BYTES} bytes")
    return open(real, "rb")


def _unpack(archive: zipfile.ZipFile, member: str) -> bytes:
    if member not in archive.namelist():
        raise ValueError("the archive has no such member")
    with archive.open(member) as file:
        data = file.read(MAX_BYTES + 1)  # what the archive says of its size may be a lie
    if len(data) > MAX_BYTES:
        raise ValueError(f"the member unpacks to more than {MAX_BYTES} bytes")
    return data


def _check_office(file: BinaryIO) -> BinaryIO:
    """Office documents are archives; their libraries unpack whatever they are given."""
    with zipfile.ZipFile(file) as archive:
        total = 0
        for name in archive.namelist():
            with archive.open(name) as part:
                total += len(part.read(MAX_BYTES + 1 - total))
            if total > MAX_BYTES:
                raise ValueError(f"the document unpacks to more than {MAX_BYTES} bytes")
    file.seek(0)
    return file


def _text(file: BinaryIO) -> str:
    data = file.read()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return data.decode(encoding, "replace")


def _csv(file: BinaryIO) -> str:
    text = _text(file)
    try:
        dialect: Any = csv.Sniffer().sniff(text[:4096], delimiters=",;\t|")
    except csv.Error:
        dialect = csv.excel
    return "\n".join("\t".join(row) for row in csv.reader(io.StringIO(text), dialect))


def _json(file: BinaryIO) -> str:
    return json.dumps(json.loads(_text(file)), indent=1, ensure_ascii=False)


def _xml(file: BinaryIO) -> str:
    from xml.etree import ElementTree

    from defusedxml.ElementTree import parse  # refuses entities and references to other files

    tree = parse(file, forbid_dtd=False)
    ElementTree.indent(tree)
    return ElementTree.tostring(tree.getroot(), encoding="unicode")


def _html(file: BinaryIO) -> str:
    from bs4 import BeautifulSoup

    page = BeautifulSoup(file.read(), "lxml")
    for element in page(["script", "style", "noscript", "template"]):
        element.decompose()
    return page.get_text("\n", strip=True)


def _xlsx(file: BinaryIO) -> str:
    import openpyxl

    book = openpyxl.load_workbook(_check_office(file), read_only=True, data_only=True)
    lines = []
    for sheet in book:
        lines.append(f"# {sheet.title}")
        for row in sheet.iter_rows(values_only=True):
            lines.append("\t".join("" if cell is None else str(cell) for cell in row).rstrip())
    return "\n".join(lines)


def _docx(file: BinaryIO) -> str:
    import docx

    return "\n".join(_blocks(docx.Document(_check_office(file))))


def _blocks(container: Any) -> Iterator[str]:
    """Paragraphs, and tables row by row, in their order."""
    for block in container.iter_inner_content():
        if hasattr(block, "rows"):
            yield from _rows(block)
        else:
            yield block.text


def _rows(table: Any) -> Iterator[str]:
    for row in table.rows:
        yield "\t".join(cell.text for cell in row.cells)


def _pptx(file: BinaryIO) -> str:
    import pptx

    lines = []
    for number, slide in enumerate(pptx.Presentation(_check_office(file)).slides, 1):
        lines.append(f"# Slide {number}")
        for shape in slide.shapes:
            if shape.has_text_frame:
                lines.append(shape.text_frame.text)
            if shape.has_table:
                lines += _rows(shape.table)
        if slide.has_notes_slide:
            lines.append(f"Notes: {slide.notes_slide.notes_text_frame.text}")
    return "\n".join(lines)


def _pdf(file: BinaryIO) -> str:
    import pypdf

    pages = enumerate(pypdf.PdfReader(file).pages, 1)
    return "\n".join(f"# Page {number}\n{page.extract_text()}" for number, page in pages)


def _zip(file: BinaryIO) -> str:
    with zipfile.ZipFile(file) as archive:
        return "\n".join(f"{info.filename}\t{info.file_size} bytes" for info in archive.infolist())


def _image(file: BinaryIO) -> str:
    from PIL import ExifTags, Image

    with Image.open(file) as image:  # reads the header; no pixel is decoded
        lines = [f"{image.format}, {image.width} x {image.height} pixels, mode {image.mode}"]
        for number, value in image.getexif().items():
            lines.append(f"{ExifTags.TAGS.get(number, number)}: {value}")
        for name, value in image.info.items():
            if isinstance(value, str | int | float | tuple):
                lines.append(f"{name}: {value}")
    return "\n".join(lines)


READERS: dict[str, Callable[[BinaryIO], str]] = {
    "csv": _csv,
    "docx": _docx,
    "html": _html,
    "image": _image,
    "json": _json,
    "pdf": _pdf,
    "pptx": _pptx,
    "txt": _text,
    "xlsx": _xlsx,
    "xml": _xml,
    "zip": _zip,
}
