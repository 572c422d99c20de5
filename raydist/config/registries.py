"""What a recipe may choose by name, and where its implementations live."""

from __future__ import annotations

from raydist.config.base import Registry

OBJECTIVES = Registry("objective", package="raydist.objectives", key="objective")
SAMPLERS = Registry("sampler", package="raydist.sampling", key="sampling.sampler")
