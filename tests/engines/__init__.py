"""Tests that hold the engines against each other."""
