"""The objective quality: rows of a step, learning rate and rank, by the held-out loss of each language."""
