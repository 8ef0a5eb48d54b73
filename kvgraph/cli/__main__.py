"""`python -m kvgraph.cli`, for where the `kvgraph` script isn't on the path."""

from kvgraph.cli import main

main()
