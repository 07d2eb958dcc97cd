"""Serialises records: preamble, directory, chunks (SPEC.md chapters 4 to 7 and 15 to 17)."""
