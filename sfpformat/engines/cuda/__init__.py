"""Decoding on CUDA devices: `engine` is the engine, `driver` the only module that talks to CUDA."""
