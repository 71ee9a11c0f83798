"""Weight edits without a training loop: arithmetic of updates, repair, pruning, rank editing."""
