"""Tests of keyed tables."""
