"""Commands that check and measure the kernels, and the shim that runs them without a GPU."""
