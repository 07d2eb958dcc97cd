"""Encoding: the encoder's choices, and the writer."""
