"""Decoding: the reader, the validator, and the modules that decode chunks."""
