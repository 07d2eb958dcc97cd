"""Tests that compare the engines with each other."""
