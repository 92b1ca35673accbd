"""The command line: one short function a verb, which parses, calls and prints.

Heavy imports happen inside the verbs, so that ``--help`` is instant.
"""

from domlora.cli.program import app, main

__all__ = ["app", "main"]
