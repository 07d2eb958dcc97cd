"""Input and output: positional reads, atomic writes, safetensors files, checksums, threads."""
