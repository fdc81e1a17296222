"""Office documents, books and notebooks become text; pages without text are counted and named."""

import io
import json
import sys
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pytest

from longfit.data import extraction
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


def docx_with_more() -> bytes:
    """A document with what python-docx does not give: a content control, a text box, an inserted run, a footnote."""
    import docx as library
    from docx.oxml import parse_xml

    document, file = library.Document(), io.BytesIO()
    inside = "".join(
        f"<w:{name}><w:r><w:t>lost</w:t></w:r></w:{name}>" for name in ("sdtContent", "txbxContent", "ins")
    )
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    more = f'<w:p xmlns:w="{space}"><w:r><w:t>Seen.</w:t><w:footnoteReference w:id="2"/></w:r>{inside}</w:p>'
    document.element.body.insert(0, parse_xml(more))
    document.save(file)
    return file.getvalue()


def pptx_with_notes() -> bytes:
    import pptx as library

    show, file = library.Presentation(), io.BytesIO()
    slide = show.slides.add_slide(show.slide_layouts[5])
    slide.shapes.title.text, slide.notes_slide.notes_text_frame.text = "Hello", "Speak slowly."
    show.save(file)
    return file.getvalue()


def mail(text: str = "Dear all\n", *, html: str | None = None, attachment: bytes | None = None) -> bytes:
    message = EmailMessage()
    message["From"], message["Subject"], message["X-Spam"] = "ana@x", "Tromsø", "no"
    message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    if attachment is not None:
        message.add_attachment(attachment, maintype="application", subtype="pdf")
    return message.as_bytes()


READ_MAIL = "From: ana@x\nSubject: Tromsø\n\nDear all"
MAILBOX = b"From a@x Mon\n" + mail() + b"\nFrom b@x Tue\n" + mail("A line\n>From the start\n")
PAGE = mail("", html="<p>See <b>this</b></p>").replace(b"From: ana@x\n", b"")

NOTEBOOK = json.dumps({"cells": [{"cell_type": "markdown", "source": ["# T\n", "x"]}, {"source": "y = 1"}]}).encode()
RUN = json.dumps({"cells": [{"cell_type": "code", "source": "y", "outputs": [{"text": "1"}, {"text": "2"}]}]}).encode()
LOST = (("footnotes", 1), ("text boxes", 1), ("content controls", 1), ("tracked insertions", 1))


@pytest.mark.parametrize(
    ("kind", "data", "text", "units"),
    [
        ("pdf", pdf("Hello", "", "World"), "Hello\n\nWorld", Extraction("pages", 3, 12, (2,))),
        ("docx", docx(), "Title\n\nFirst.\n\nName\tAge\n\nLast.", Extraction("parts", 4, 30, ())),
        ("pptx", pptx(), "Hello", Extraction("slides", 2, 5, (2,))),
        ("epub", epub(), "Chapter 2\n\né\n\nChapter 1\n\né", Extraction("chapters", 2, 26, ())),
        ("ipynb", NOTEBOOK, "# T\nx\n\ny = 1", Extraction("cells", 2, 12, ())),
        ("ipynb", RUN, "y", Extraction("cells", 1, 1, (), (("outputs of cells", 2),))),
        ("docx", docx_with_more(), "Seen.", Extraction("parts", 1, 5, (), LOST)),
        ("pptx", pptx_with_notes(), "Hello", Extraction("slides", 1, 5, (), (("speaker's notes", 1),))),
        ("eml", mail(), READ_MAIL, Extraction("mails", 1, 37, ())),
        (
            "eml",
            mail(html="<p>x</p>", attachment=b"%"),
            READ_MAIL,
            Extraction("mails", 1, 37, (), (("attachments", 1),)),
        ),
        (
            "mbox",
            MAILBOX,
            f"{READ_MAIL}\n\nFrom: ana@x\nSubject: Tromsø\n\nA line\nFrom the start",
            Extraction("mails", 2, 89, ()),
        ),
        ("mht", PAGE, "See this", Extraction("parts", 1, 8, ())),
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


def test_a_mail_without_headers_is_no_mail() -> None:
    with pytest.raises(DataError, match="not a mail: it begins with no headers"):
        extract("eml", io.BytesIO(b"\nhello\n"))


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
    assert "a scanned page is a picture" in "\n".join(documents.report.warnings())
    assert documents.report.notes()[1] == "extracted 5 characters from 2 pages of 1 files, 1 pages without text"
    (tmp_path / "n.rtf").rename(tmp_path / "more.ipynb")
    (tmp_path / "more.ipynb").write_bytes(RUN)
    said = "\n".join(read_documents(tmp_path).report.warnings())
    assert "left out of documents that are no plain text: outputs of cells (2)" in said
    (tmp_path / "n.rtf").write_bytes(b"{\\rtf1 x}")
    with pytest.raises(DataError, match=r"\.rtf is not read; convert it first, for example: pandoc"):
        read_documents(tmp_path / "n.rtf")


def changed_docx(*changes: tuple[str, str]) -> bytes:
    """The document of `docx`, with replacements in its XML."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(docx())) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "word/document.xml":
                for before, after in changes:
                    assert before.encode() in data
                    data = data.replace(before.encode(), after.encode(), 1)
            new.writestr(name, data)
    return file.getvalue()


def test_a_merged_cell_is_one_cell_however_many_columns_it_says_to_span() -> None:
    wide = changed_docx(("<w:tcPr>", '<w:tcPr><w:gridSpan w:val="99999999"/>'))
    assert extract("docx", io.BytesIO(wide))[0] == "Title\n\nFirst.\n\nName\tAge\n\nLast."


ENTITIES = "".join(f'<!ENTITY x{n} "{f"&x{n - 1};" * 10}">' for n in range(1, 10))
LAUGHS = f'<!DOCTYPE d [<!ENTITY x0 "ha">{ENTITIES}]>'
OUTSIDE = '<!DOCTYPE d [<!ENTITY x9 SYSTEM "file:///etc/hostname">]>'


def test_entities_that_multiply_are_refused() -> None:
    document = changed_docx(("<w:document ", f"{LAUGHS}<w:document "), ("Last.", "&x9;"))
    with pytest.raises(DataError, match="amplification"):
        extract("docx", io.BytesIO(document))
    book = io.BytesIO()
    with zipfile.ZipFile(book, "w") as archive:
        archive.writestr("META-INF/container.xml", f'{LAUGHS}<c xmlns="u"><rootfile full-path="&x9;"/></c>')
    with pytest.raises(DataError, match="amplification"):
        extract("epub", io.BytesIO(book.getvalue()))


def test_a_document_reads_no_other_file() -> None:
    document = changed_docx(("<w:document ", f"{OUTSIDE}<w:document "), ("Last.", "&x9;"))
    assert extract("docx", io.BytesIO(document))[0] == "Title\n\nFirst.\n\nName\tAge"


def test_what_costs_more_than_its_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    many = changed_docx(("Last.</w:t></w:r></w:p>", "Last.</w:t></w:r></w:p>" + "<w:p/>" * 7_000_000))
    assert len(many) < 200_000
    with pytest.raises(DataError, match=r"word/document\.xml in it has more than 6,000,000 elements and attributes"):
        extract("docx", io.BytesIO(many))
    monkeypatch.setattr(extraction, "LEAST_S", -1.0)
    with pytest.raises(DataError, match=r"takes more than -1 s of a processor, out of proportion to its \d+ bytes"):
        extract("pdf", io.BytesIO(pdf("Hello")))


def test_chapters_that_are_read_again_and_again_are_bounded() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("META-INF/container.xml", '<c xmlns="u"><rootfile full-path="b.opf"/></c>')
        spine = '<itemref idref="c"/>' * 100
        book.writestr(
            "b.opf", f'<package xmlns="o"><manifest><item id="c" href="c.xhtml"/></manifest>{spine}</package>'
        )
        book.writestr("c.xhtml", f"<p>{'x' * 1_000_000}</p>")
    with pytest.raises(DataError, match=r"unpack to .* or more; allowed are 64.0 MiB: save its text"):
        extract("epub", io.BytesIO(file.getvalue()))
