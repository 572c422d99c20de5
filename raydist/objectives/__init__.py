"""What a batch becomes and what it costs. One file per objective; :mod:`raydist.objectives.base` is the contract."""
