"""The conformance suite of the `.sfp` format: its runner, its judge, and a reader made from SPEC.md alone."""

__version__ = "1.0.0.dev0"
