"""Tests of models in folders, as transformers has them."""
