"""Tests of the CUDA engine, most of them without a GPU."""
