"""What `make soak` makes longer. Tests marked `slow` run there alone; others take more draws, kills or seconds."""

import os

SOAK = os.environ.get("KVGRAPH_SOAK", "0") not in ("", "0")


def draws(usual: int) -> int:
    """Examples of a property test that draws `usual` ones in `make test`."""
    return usual * 25 if SOAK else usual
