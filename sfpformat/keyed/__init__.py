"""Keyed tables: maps from keys, which are byte strings, to rows of weights (SPEC.md chapter 17)."""
