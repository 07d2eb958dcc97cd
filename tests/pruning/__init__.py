"""Tests of importances and pruning."""
