"""Office documents, books and notebooks become text; pages without text are counted and named."""

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

from longfit.data.documents import read_documents
from longfit.data.extraction import Extraction, extract
from longfit.errors import DataError


def pdf(*pages: str) -> bytes:
    """A PDF of one line a page; an empty text is a page that holds no text."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode() if text else b""
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        contents = len(objects)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % contents
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(out)


def docx() -> bytes:
    import docx as library

    document, file = library.Document(), io.BytesIO()
    document.add_heading("Title")
    document.add_paragraph("First.")
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "Name", "Age"
    document.add_paragraph("Last.")
    document.save(file)
    return file.getvalue()


def pptx() -> bytes:
    import pptx as library

    show, file = library.Presentation(), io.BytesIO()
    for text in ("Hello", ""):
        slide = show.slides.add_slide(show.slide_layouts[5])
        slide.shapes.title.text = text
    show.save(file)
    return file.getvalue()


def epub() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as book:
        book.writestr("META-INF/container.xml", '<c xmlns="u"><rootfile full-path="OPS/book.opf"/></c>')
        items = "".join(f'<item id="c{n}" href="text/c%20{n}.xhtml"/>' for n in (1, 2))
        spine = '<itemref idref="c2"/><itemref idref="c1"/>'
        package = f'<package xmlns="o"><manifest>{items}</manifest><spine>{spine}</spine></package>'
        book.writestr("OPS/book.opf", package)
        for n in (1, 2):
            book.writestr(f"OPS/text/c {n}.xhtml", f"<html><body><h1>Chapter {n}</h1><p>é</p></body></html>")
    return file.getvalue()


NOTEBOOK = json.dumps({"cells": [{"cell_type": "markdown", "source": ["# T\n", "x"]}, {"source": "y = 1"}]}).encode()


@pytest.mark.parametrize(
    ("kind", "data", "text", "units"),
    [
        ("pdf", pdf("Hello", "", "World"), "Hello\n\nWorld", Extraction("pages", 3, 12, (2,))),
        ("docx", docx(), "Title\n\nFirst.\n\nName\tAge\n\nLast.", Extraction("parts", 4, 30, ())),
        ("pptx", pptx(), "Hello", Extraction("slides", 2, 5, (2,))),
        ("epub", epub(), "Chapter 2\n\né\n\nChapter 1\n\né", Extraction("chapters", 2, 26, ())),
        ("ipynb", NOTEBOOK, "# T\nx\n\ny = 1", Extraction("cells", 2, 12, ())),
    ],
)
def test_a_document_becomes_text_and_a_report(kind: str, data: bytes, text: str, units: Extraction) -> None:
    assert extract(kind, io.BytesIO(data)) == (text, units)


@pytest.mark.parametrize(
    ("kind", "data"),
    [("pdf", b"%PDF-1.4 x"), ("docx", b"PK"), ("pptx", b"PK\x03\x04\x00"), ("epub", b"PK"), ("ipynb", b'{"a": 1}')],
)
def test_damaged_documents_are_refused(kind: str, data: bytes) -> None:
    with pytest.raises(DataError, match=r"not a readable|not a notebook"):
        extract(kind, io.BytesIO(data))


def test_without_the_extra_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(DataError, match=r"pip install 'longfit\[documents\]'"):
        extract("pdf", io.BytesIO(pdf("x")))


def test_the_report_of_a_folder_counts_pages_and_names_those_without_text(tmp_path: Path) -> None:
    (tmp_path / "scan.pdf").write_bytes(pdf("", "Hello"))
    (tmp_path / "b.epub").write_bytes(epub())
    (tmp_path / "n.rtf").write_bytes(b"{\\rtf1 x}")
    documents = read_documents(tmp_path)
    assert [document.name for document in documents] == ["b.epub", "scan.pdf"]
    assert "scan.pdf: 1 of 2 pages hold no text (1)" in "\n".join(documents.report.warnings())
    assert documents.report.notes()[1] == "extracted 5 characters from 2 pages of 1 files, 1 pages without text"
    with pytest.raises(DataError, match=r"\.rtf is not read; convert it first, for example: pandoc"):
        read_documents(tmp_path / "n.rtf")
