"""GPU kernels: their source, and what tests and measures them; the engine is `sfpformat.engines.cuda`."""
