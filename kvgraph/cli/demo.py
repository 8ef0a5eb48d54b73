"""`kvgraph demo`: the whole thing in a minute, with nothing to download."""

from __future__ import annotations


def demo() -> None:
    """Show encoding, asking, restarting and exactness on documents that come with the package.

    It builds a tiny random model on the spot, so the answers are gibberish; what to look at is what is computed and what
    is reused, how long the first token takes, and that the answers stay the same. Nothing is downloaded or left behind.

    \b
      kvgraph demo
    """
    from kvgraph.demo.run import run

    run()
