"""Decoding on CUDA devices. `engine` is the engine; `driver` is the only module that calls CUDA."""
