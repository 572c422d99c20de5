"""Distributed training, on Ray, of language models that decode in parallel.

Importing this package has no effects and imports nothing heavy: the subpackages are imported by name
(``from raydist.training import loop``), and the command line imports them inside its verbs.
"""

__version__ = "0.1.0"
