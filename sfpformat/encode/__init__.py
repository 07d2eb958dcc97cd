"""From tensors to a file: the encoder's choices, and the writer."""
