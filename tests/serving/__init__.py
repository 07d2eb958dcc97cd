"""Tests of the loaders for inference engines."""
