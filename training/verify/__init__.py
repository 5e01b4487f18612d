"""Whether a checkpoint is what it says: its files, its settings, its weights, and the logits that come out."""
