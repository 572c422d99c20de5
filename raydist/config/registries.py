"""What a recipe may choose by name, and where its implementations live."""

from __future__ import annotations

from raydist.config.base import Registry

OBJECTIVES = Registry("objective", package="raydist.objectives", key="objective")
PATHS = Registry("path", package="raydist.paths", key="objective.path")
SCHEDULES = Registry("schedule", package="raydist.paths", key="objective.path.schedule")
SOURCES = Registry("source", package="raydist.paths", key="objective.path.source")
COUPLINGS = Registry("coupling", package="raydist.paths", key="objective.path.coupling")
UNMASKING = Registry("unmasking policy", package="raydist.sampling.unmasking", key="sampling.sampler.unmasking")
SAMPLERS = Registry("sampler", package="raydist.sampling", key="sampling.sampler")
