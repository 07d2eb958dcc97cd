"""GPU kernels: their source, and tools that test and measure them; the engine is `sfpformat.engines.cuda`."""
