"""Tests of what SPEC.md says, chapter by chapter."""
