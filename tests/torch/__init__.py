"""Tests of PyTorch models, layers and tensors."""
