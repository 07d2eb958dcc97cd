"""The demonstration: a small language model, itself stored as `.sfp`, that shows what pruning costs."""
