"""What a recipe may choose by name, and where its implementations live."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from raydist.config.base import Registry

if TYPE_CHECKING:
    from raydist.config.schema import ModelConfig

OBJECTIVES = Registry("objective", package="raydist.objectives", key="objective")
PATHS = Registry("path", package="raydist.paths", key="objective.path")
SCHEDULES = Registry("schedule", package="raydist.paths", key="objective.path.schedule")
SOURCES = Registry("source", package="raydist.paths", key="objective.path.source")
COUPLINGS = Registry("coupling", package="raydist.paths", key="objective.path.coupling")
UNMASKING = Registry("unmasking policy", package="raydist.sampling.unmasking", key="sampling.sampler.unmasking")
SAMPLERS = Registry("sampler", package="raydist.sampling", key="sampling.sampler")
_PRESETS = "raydist.models.presets"


def require_decoder(model: ModelConfig) -> None:
    """Refuses what no decoder can be: a preset that nobody has, overrides that do not fit it.

    Of weights to start from, which may lie on another machine, only the names of the overrides are checked.

    Raises:
        ConfigError: naming ``model.preset`` or the override.
    """
    presets = importlib.import_module(_PRESETS)
    if model.init_from is None:
        presets.changed(presets.find(model.preset), model.overrides)
    else:
        presets.require_fields(model.overrides)
