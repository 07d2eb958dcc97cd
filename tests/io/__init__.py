"""Tests of input and output of files."""
