"""The demonstration: prunes a small language model, stored as `.sfp`, and measures its perplexity."""
