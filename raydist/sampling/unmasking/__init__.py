"""Which masked positions a forward reveals. One file per policy; :mod:`raydist.sampling.unmasking.base` is the contract."""
