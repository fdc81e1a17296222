"""Mails, mailboxes and saved web pages as text: who wrote to whom, and what; attachments and pictures are counted.

All three are MIME, which Python reads by itself. What this is not: a thread; a quoted answer stays where it is quoted.
"""

import email
import email.policy
import re
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage
from typing import BinaryIO

from longfit.data.html import html_text
from longfit.errors import DataError

MAIL_HEADERS = ("From", "To", "Cc", "Date", "Subject")


def read_mail(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str]:
    yield _message_text(stream.read(), left_out, preferred=("plain", "html"))


def read_mailbox(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str]:
    """Read the mails of a mailbox, each of which begins behind a line ``From ...``."""
    for message in re.split(rb"^From [^\n]*\n", stream.read(), flags=re.M)[1:]:
        unquoted = re.sub(rb"^>(>*From )", rb"\1", message, flags=re.M)
        yield _message_text(unquoted, left_out, preferred=("plain", "html"))


def read_saved_page(stream: BinaryIO, left_out: Counter[str]) -> Iterator[str]:
    yield _message_text(stream.read(), left_out, preferred=("html", "plain"), headers=())


def _message_text(
    data: bytes, left_out: Counter[str], *, preferred: tuple[str, ...], headers: tuple[str, ...] = MAIL_HEADERS
) -> str:
    """Take who wrote to whom, and what, out of a message; attachments and pictures are counted."""
    message = email.message_from_bytes(data, EmailMessage, policy=email.policy.default)
    if not message.keys():
        raise DataError("not a mail: it begins with no headers")
    body = message.get_body(preferred)
    for part in message.walk():
        is_text = part.get_content_maintype() == "text" and not part.is_attachment()
        if not part.is_multipart() and part is not body and not is_text:
            left_out["attachments"] += 1
    text = "" if body is None else str(body.get_content())
    if body is not None and body.get_content_subtype() == "html":
        text = html_text(text)
    said = [f"{name}: {message[name]}" for name in headers if message[name]]
    return "\n".join(said) + "\n\n" * bool(said) + text.replace("\r\n", "\n")
