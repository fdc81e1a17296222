"""Office documents, books, notebooks and mails as text, with a report of what was found, and of what is left out.

PDF, DOCX and PPTX need the extra ``documents`` (pypdf, python-docx, python-pptx: BSD and MIT licences); EPUB, notebooks
and mails are web pages in an archive, JSON and MIME, which Python reads by itself. A scanned page has no text: it is
counted and named, never read by character recognition. What holds text, and is not taken out (footnotes of a DOCX,
outputs of a notebook's cells, attachments), is counted. What this is not: layout; columns come as the file has them.
"""

import io
import json
import posixpath
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote
from xml.etree import ElementTree

from longfit.data.html import html_text
from longfit.data.mails import read_mail, read_mailbox, read_saved_page
from longfit.data.readers import decode_text
from longfit.errors import DataError
from longfit.files.expansion import ProcessorTime, require_modest, require_modest_zip
from longfit.files.reading import reason

MOST_NODES = 6_000_000
"""Of XML, about 220 bytes of memory each: some thousand pages of a text processor."""
LEAST_S, S_PER_MIB = 20.0, 60.0
"""Of a processor: several times what the slowest kind takes, a PDF of text set letter by letter."""
INSTALL = "pip install 'longfit[documents]'"


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was taken out of one file.

    Attributes:
        unit: what the file consists of: pages, slides, chapters, cells, mails or parts.
        num_units: of them.
        num_chars: of the text.
        empty: numbers of the units without text, from 1.
        left_out: what the file holds beside that text, and how often.
    """

    unit: str
    num_units: int
    num_chars: int
    empty: tuple[int, ...]
    left_out: tuple[tuple[str, int], ...] = ()


INSIDE_DOCX = {  # elements of its body whose text python-docx does not give, and pictures
    "footnoteReference": "footnotes",
    "endnoteReference": "endnotes",
    "commentReference": "comments",
    "txbxContent": "text boxes",
    "sdtContent": "content controls",
    "ins": "tracked insertions",
    "blip": "pictures",
}


def extract(kind: str, stream: BinaryIO) -> tuple[str, Extraction]:
    """Read a document.

    Args:
        kind: a key of `EXTRACTORS`.
    Returns: its text, units parted by an empty line; what was found.
    Raises: DataError: damaged, encrypted, made to become endless, or the extra is not installed.
    """
    unit, read = EXTRACTORS[kind]
    data = stream.read()
    left_out: Counter[str] = Counter()
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                require_modest_zip(archive, len(data))
                _require_few_nodes(archive)
        parts = [part.strip("\n") for part in _within_budget(read(io.BytesIO(data), left_out), len(data))]
    except ImportError:
        raise DataError(f"to read {kind} files, install what reads them: {INSTALL}") from None
    except DataError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged file leads them to
        raise DataError(
            f"not a readable {kind} file: {reason(error)}; save it again, or leave it out with data.exclude"
        ) from None
    empty = tuple(number for number, part in enumerate(parts, start=1) if not part.strip())
    text = "\n\n".join(part for part in parts if part.strip())
    return text, Extraction(unit, len(parts), len(text), empty, tuple((+left_out).most_common()))


def _require_few_nodes(archive: zipfile.ZipFile) -> None:
    """Raise DataError if the XML of an archive has more elements and attributes than memory should be spent on."""
    num_nodes = 0
    for entry in archive.infolist():
        if entry.filename.endswith((".xml", ".rels", ".opf", ".ncx")):
            with archive.open(entry) as member:
                while piece := member.read(1 << 20):
                    num_nodes += piece.count(b"<") - piece.count(b"</") + piece.count(b'="') + piece.count(b"='")
                    if num_nodes > MOST_NODES:
                        raise DataError(
                            f"{entry.filename} in it has more than {MOST_NODES:,} elements and attributes; save its "
                            "text, and give that, or leave it out with data.exclude"
                        )


def _within_budget(parts: Iterator[str | None], num_bytes: int) -> Iterator[str]:
    """Yield the parts of a document of ``num_bytes`` until they are too many: pages may share one text, and forms."""
    spent, num_chars = ProcessorTime(num_bytes, least_s=LEAST_S, s_per_mib=S_PER_MIB), 0
    for part in parts:
        num_chars += len(part or "")
        require_modest(num_chars, num_bytes, do="save its text, and give that")
        spent.check()
        if part is not None:
            yield part


def _pdf(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str]:
    import logging

    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells of every irregular object
    reader = pypdf.PdfReader(stream)
    if reader.is_encrypted and not reader.decrypt(""):
        raise DataError("the PDF is encrypted; save it without its password")
    for page in reader.pages:
        yield page.extract_text() or ""


def _docx(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str | None]:
    """Read paragraphs and tables; an empty paragraph is no part."""
    import docx

    body = docx.Document(stream).element.body
    kinds = Counter(str(element.tag).rpartition("}")[2] for element in body.iter())
    left_out.update({words: kinds[kind] for kind, words in INSIDE_DOCX.items() if kinds[kind]})
    for block in body.inner_content_elements:
        if hasattr(block, "tr_lst"):
            yield "\n".join("\t".join(_cell_text(cell) for cell in row.tc_lst) for row in block.tr_lst)
        else:
            text = block.text
            yield text if text.strip() else None


def _cell_text(cell: Any) -> str:
    """Of a cell as the file has it: ``row.cells`` has it for every column that it says to span, which may be 2^31."""
    return "\n".join(paragraph.text for paragraph in cell.p_lst)


def _pptx(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str]:
    import pptx

    for slide in pptx.Presentation(stream).slides:
        notes = slide.notes_slide.notes_text_frame if slide.has_notes_slide else None
        left_out["speaker's notes"] += bool(notes is not None and notes.text.strip())
        left_out["pictures"] += sum(str(element.tag).endswith("}blip") for element in slide.element.iter())
        yield "\n".join(text for shape in slide.shapes for text in _shape_texts(shape) if text.strip())


def _shape_texts(shape: Any) -> Iterator[str]:
    if hasattr(shape, "shapes"):
        for inner in shape.shapes:
            yield from _shape_texts(inner)
    if getattr(shape, "has_text_frame", False):
        yield shape.text_frame.text
    if getattr(shape, "has_table", False):
        for row in shape.table.rows:
            yield "\t".join(cell.text for cell in row.cells)


def _epub(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str]:
    """Read the chapters of a book in the order of its spine."""
    with zipfile.ZipFile(stream) as book:
        container = ElementTree.fromstring(book.read("META-INF/container.xml"))
        package_name = next(node.attrib["full-path"] for node in container.iter() if node.tag.endswith("rootfile"))
        package = ElementTree.fromstring(book.read(package_name))
        files = {node.attrib["id"]: node.attrib["href"] for node in package.iter() if node.tag.endswith("}item")}
        for node in package.iter():
            if node.tag.endswith("}itemref"):
                name = posixpath.join(posixpath.dirname(package_name), unquote(files[node.attrib["idref"]]))
                yield html_text(decode_text(book.read(posixpath.normpath(name))))


def _notebook(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str]:
    notebook = json.loads(decode_text(stream.read()))
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise DataError("not a notebook: it has no list of cells")
    for cell in notebook["cells"]:
        source = cell.get("source", "")
        left_out["outputs of cells"] += len(cell.get("outputs") or ())
        yield "".join(source) if isinstance(source, list) else str(source)


EXTRACTORS: dict[str, tuple[str, Callable[[BinaryIO, Counter[str]], Iterator[str | None]]]] = {
    "pdf": ("pages", _pdf),
    "docx": ("parts", _docx),
    "pptx": ("slides", _pptx),
    "epub": ("chapters", _epub),
    "ipynb": ("cells", _notebook),
    "eml": ("mails", read_mail),
    "mbox": ("mails", read_mailbox),
    "mht": ("parts", read_saved_page),
}
