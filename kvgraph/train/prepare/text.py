"""FineWeb: plain text, and long documents whose beginning is cut into segments that the rest continues."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

from pydantic import BaseModel

from kvgraph.data.task import Hub
from kvgraph.data.tasks.segments import SENTENCE_ENDS
from kvgraph.train.prepare.source import Made, PrepareJob, Skip, Source, each

LONG = 2048  # minimum tokens of a document to be cut
SEGMENTS = (5, 40)  # number of segments, drawn evenly
CUT = (500, 1500)  # tokens of all segments together, drawn evenly
FITS = 3584  # tokens of a text-inst document, so that a chat template and 40 x 5 link tokens still fit 4,096
INSTRUCTION = "\n\nGo on with the text above where it ends."


class WebPage(BaseModel):
    """A row of FineWeb; its other fields (url, dump, language, token_count, ...) aren't needed."""

    text: str


def text(page: WebPage, job: PrepareJob, draw: random.Random) -> Iterator[Made]:
    """The document as it is."""
    if not page.text.strip():
        raise Skip("empty")
    yield {"text": page.text}


def text_mem(page: WebPage, job: PrepareJob, draw: random.Random) -> Iterator[Made]:
    """Segments, and the rest of the document to be learned after them, without a prompt."""
    segments, end, _ = segmented(page.text, job.tokenizer.ends, draw)
    yield {"documents": segments, "text": page.text[end:]}


def text_inst(page: WebPage, job: PrepareJob, draw: random.Random) -> Iterator[Made]:
    """The same as a conversation: the user asks for a continuation of the segments, and the assistant gives it.

    If the document is too long, the answer ends at the end of a sentence, because it is learned as the end of a turn.
    """
    segments, end, ends = segmented(page.text, job.tokenizer.ends, draw)
    rest = page.text[end:]
    if len(ends) > FITS:
        rest = page.text[end : ends[FITS - 1]]
        rest = rest[: max((found.end() for found in SENTENCE_ENDS.finditer(rest)), default=len(rest))]
    yield {
        "documents": segments,
        "messages": [{"role": "user", "content": INSTRUCTION}, {"role": "assistant", "content": rest.strip()}],
    }


def segmented(whole: str, ends_of: Callable[[str], list[int]], draw: random.Random) -> tuple[list[str], int, list[int]]:
    """The beginning of a text in segments, cut between tokens; the place where they end in it; the ends of all its tokens.

    Joined, the segments are the beginning. The cuts are drawn evenly, so the lengths vary widely. Characters of several
    tokens aren't cut, so there may be one segment less. Raises Skip for a text that is too short.
    """
    ends = ends_of(whole)
    if len(ends) < LONG:
        raise Skip(f"shorter than {LONG:,} tokens")
    total, count = draw.randint(*CUT), draw.randint(*SEGMENTS)
    breaks = [0, *sorted(draw.sample(range(1, total), count - 1)), total]
    cuts = [0, *(ends[b - 1] for b in breaks[1:])]
    if not whole[cuts[-1] :].strip():
        raise Skip("nothing after the segments")
    return [whole[a:b] for a, b in pairwise(cuts) if a < b], cuts[-1], ends


def _key(page: WebPage) -> str:
    return page.text


_HUB = Hub("HuggingFaceFW/fineweb", "sample-10BT", split="train")
_KVLINK = "KVLink (arXiv 2502.16002; github.com/UCSB-NLP-Chang/KVLink: fineweb.py, titan_preprocessor.py)"

FINEWEB_TEXT = Source(
    name="fineweb-text",
    about="FineWeb: plain text",
    origin=f"FineWeb (arXiv 2406.17557); {_KVLINK}",
    hub=_HUB,
    sample="fineweb.jsonl",
    outcomes=each(WebPage, _key, text),
)

FINEWEB_TEXT_MEM = Source(
    name="fineweb-text-mem",
    about="FineWeb: long documents, 5 to 40 segments and what follows them",
    origin=f"{_KVLINK}, `process_textmem`. There, this set and text-inst share no document",
    hub=_HUB,
    sample="fineweb.jsonl",
    outcomes=each(WebPage, _key, text_mem),
    needs_tokenizer=True,
)

FINEWEB_TEXT_INST = Source(
    name="fineweb-text-inst",
    about="FineWeb: the same as a conversation in which a text is continued",
    origin=f"{_KVLINK}, `process_textinst`",
    hub=_HUB,
    sample="fineweb.jsonl",
    outcomes=each(WebPage, _key, text_inst),
    needs_tokenizer=True,
)
