"""Launcher for a checkout that is not installed: python cli.py convert ..."""

from normswap.cli import main

if __name__ == "__main__":
    main()
