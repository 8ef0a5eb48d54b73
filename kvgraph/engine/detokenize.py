"""From tokens to text that can be streamed and ends at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvgraph.engine.sampling import stop_strings

REPLACEMENT = "\ufffd"  # decoders give it for bytes that aren't a whole character (yet)
LONGEST_WAIT = 16  # tokens that may wait for a character to be completed; a real one needs at most 4


class TextStream:
    """Text of one answer as its tokens come, for any tokenizer, cut at the first stop string.

    decode: token ids -> text. It may strip a leading space, merge tokens, or give U+FFFD for half a character: a few
    tokens before the new ones are always decoded with them, so the pieces concatenate to decode(all tokens), at a cost
    a token that doesn't grow with the answer. (Exception: a decoder that rewrites text it gave earlier, as byte
    fallback does when whole characters are followed by broken bytes; what was shown stays.)

    stop: strings that end the answer. The one that is *completed* first counts, and of several completed by the same
    character the longest, so how the text is split into tokens makes no difference. Those completed by the first
    min_tokens tokens don't count. before: tokens whose text the answer follows without a break; without them it begins as
    a text does, with some tokenizers without its first space.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Iterable[str] = (),
        min_tokens: int = 0,
        before: Sequence[int] = (),
    ):
        self.stopped = False
        self._unstoppable = min_tokens  # how many tokens from now on
        self._decode = decode
        self._stop = stop_strings(stop)
        self._pieces: list[str] = []
        self._held = ""  # decoded, but possibly the beginning of a stop string
        # Two neighbouring groups of tokens, each ending with a whole character: the earlier one, whose text is known,
        # is the context in which the later, still growing one is decoded (TGI's and vLLM's prefix offset).
        self._context: list[int] = list(before)
        self._waiting: list[int] = []

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Take the next token; returns the text that can now be shown, often "". After a stop it is always ""."""
        if self.stopped:
            return ""
        self._waiting.append(token)
        self._unstoppable -= 1
        text = self._fresh()
        if text and not text.endswith(REPLACEMENT):
            self._settle(len(self._waiting))
        elif len(self._waiting) <= LONGEST_WAIT:
            return ""
        elif text:  # not half a character but invalid bytes
            whole = self._last_whole(text)
            settled = self._fresh(whole)
            self._settle(whole)
            text = settled
        else:  # special tokens without text
            self._waiting.clear()
        return self._show(text)

    def finish(self) -> str:
        """Returns the text held back, including half characters; "" after a stop or when called again."""
        if self.stopped:
            return ""
        shown = self._show(self._fresh())
        self._settle(len(self._waiting))
        if not self.stopped and self._held:
            shown += self._held
            self._pieces.append(self._held)
        self._held = ""
        return shown

    def _fresh(self, n: int | None = None) -> str:
        """Text that the first n waiting tokens (None: all) add to what came before."""
        waiting = self._waiting[:n]
        before = self._decode(self._context)
        text = self._decode(self._context + waiting)
        # A decoder that rewrote the context can't be followed: continue with the new tokens alone.
        return text[len(before) :] if text.startswith(before) else self._decode(waiting)

    def _settle(self, n: int) -> None:
        """The text of the first n waiting tokens is final; they become the context of the others."""
        if n:
            self._context, self._waiting = self._waiting[:n], self._waiting[n:]

    def _last_whole(self, text: str) -> int:
        """How many of the waiting tokens, whose text this is, surely end before the unfinished character."""
        for n in range(len(self._waiting) - 1, 0, -1):
            if self._fresh(n) + self._decode(self._waiting[n:]) == text:  # a cut here changes nothing
                return n
        return len(self._waiting)

    def _show(self, text: str) -> str:
        """The part of the held text and `text` that can be shown: up to a stop string, or to what may become one."""
        text = self._held + text
        if self._unstoppable > 0:
            self._held = ""
            self._pieces.append(text)
            return text
        stops = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if stops:
            self.stopped = True
            shown, self._held = text[: min(stops)[1]], ""
        else:
            held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            shown, self._held = text[: len(text) - held], text[len(text) - held :]
        self._pieces.append(shown)
        return shown
