"""Integers to bits and back: the entropy coder of SPEC.md chapters 8 to 14, as pure functions."""
