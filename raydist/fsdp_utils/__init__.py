"""How a model becomes sharded: mesh, precision, wrapping order and the one path from meta tensors to weights."""
