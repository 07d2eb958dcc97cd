"""Keyed tables (SPEC.md chapter 17): the hash of keys, the rows of weights, and the bit array."""
