"""How a trained model is rolled out. One file per sampler; :mod:`raydist.sampling.base` is the protocol."""
