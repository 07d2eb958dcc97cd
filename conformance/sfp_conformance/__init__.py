"""The conformance suite of the `.sfp` format: runner, judge, fuzzer, and a reader made from SPEC.md alone."""

__version__ = "1.0.0.dev0"
