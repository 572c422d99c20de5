"""The one loop. Plain torch.distributed: the same code runs under ``python``, ``torchrun``, tests and Ray."""
