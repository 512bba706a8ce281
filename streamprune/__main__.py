"""`python -m streamprune`."""

from streamprune.cli import main

main()
