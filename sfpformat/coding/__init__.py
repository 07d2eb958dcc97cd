"""The entropy coder of SPEC.md chapters 8 to 14: converts integers to bits and back, as pure functions."""
