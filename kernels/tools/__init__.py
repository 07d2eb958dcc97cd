"""Commands that check and measure the kernels, and a shim that runs the kernels without a GPU."""
