"""The command line: argv → one public call → a table, a picture or JSON.

One file per command, and no logic that the library does not offer too. Nothing here imports torch
before a command has really started: help texts must cost nothing.
"""

from normswap.cli.app import main

__all__ = ["main"]
