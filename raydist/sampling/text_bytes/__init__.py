"""A token model seen as a model of bytes."""
