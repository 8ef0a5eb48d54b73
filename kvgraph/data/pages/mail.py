"""Mailboxes: a message is a page, and links to the messages that it answers."""

from __future__ import annotations

import email.policy
import mailbox
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from kvgraph.data.pages import html, plain
from kvgraph.data.pages.base import MESSAGE, MOST_BYTES, PageElement, Say, SourcePage, unique, words


def read(path: Path, say: Say) -> Iterator[SourcePage]:
    """The messages of a mailbox in mbox format, one at a time. Attachments are counted, not read."""
    box = mailbox.mbox(path, create=False)
    try:
        for number, key in enumerate(box.iterkeys(), 1):
            where = f"{path}, message {number}"
            with box.get_file(key) as file:
                raw = file.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                say(f"{where} is left out: it has more than {MOST_BYTES >> 20} MiB")
                continue
            try:
                yield _message(raw, f"{path.name}:{number}", where, say)
            except Exception as error:  # the email package raises whatever a broken header leads to
                say(f"{where} is left out: {type(error).__name__}: {str(error)[:100]}")
    finally:
        box.close()


def _message(raw: bytes, name: str, where: str, say: Say) -> SourcePage:
    message: Any = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("plain", "html"))
    head = [f"{field}: {words(str(message[field]))}" for field in ("From", "To", "Date") if message[field]]
    replies = f"{message.get('References', '')} {message.get('In-Reply-To', '')}".split()
    links = unique(f"{MESSAGE}{reply.strip('<>')}" for reply in reversed(replies))
    found = [PageElement("\n".join(head), links=links)] if head or links else []
    if body is not None:
        raw_text: Any = body.get_payload(decode=True) or b""
        charset = body.get_content_charset() or "utf-8"
        try:
            text = raw_text.decode(charset, "replace")
        except LookupError:
            text = raw_text.decode("utf-8", "replace")
        text = text.replace("\r\n", "\n").replace("\0", "\ufffd")
        is_html = body.get_content_type() == "text/html"
        found += html.page(text, name, where, say).elements if is_html else plain.elements(text)
    attached = sum(1 for _ in message.iter_attachments())
    if attached:
        say(f"{where}: {attached} attachments aren't read")
    id = words(str(message.get("Message-ID", ""))).strip("<>")
    return SourcePage(
        f"{MESSAGE}{id}" if id else name, words(str(message["Subject"] or "")) or name, tuple(found), where
    )
