"""From a file to tensors: the reader, the validator, and what decodes chunks."""
