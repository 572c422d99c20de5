"""Token datasets: sources, tokenizers, preparation, and a loader whose order is a function of (seed, epoch, row)."""
