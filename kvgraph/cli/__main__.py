"""`python -m kvgraph.cli`, for when the `kvgraph` script isn't on the path."""

from kvgraph.cli import main

main()
