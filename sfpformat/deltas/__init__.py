"""Deltas: files that store how the tensors of a model differ from those of a base (SPEC.md chapter 28)."""
