"""A working folder, as the tests of the command line have it."""

from tests.cli.conftest import here, model

__all__ = ["here", "model"]
