"""The code of a registered model: MLflow copies this file beside the weights and runs it to load them, so that nothing
has to be unpickled.
"""

from __future__ import annotations

from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from raydist.core.errors import ConfigError
from raydist.serving.text_model import TextModel
from raydist.tracking.pull import fetch_pointed


class SamplingModel(PythonModel):
    """Continues prompts; the parameters of ``predict`` choose sampler, length and seed."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the exported folder; fetches first what the version only points to, and checks its hash."""
        folder = context.artifacts["export"]
        fetch_pointed(folder)
        self._model = TextModel.load(folder)

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """The text that follows each prompt.

        Args:
            context: unused; the model is loaded by then.
            model_input: one column of prompts. MLflow makes it of a list, too.
            params: ``sampler``, ``max_new_tokens`` and ``seed``; what is missing is the recipe's.

        Raises:
            ConfigError: a prompt is no text, or the sampler does not fit the model.
        """
        prompts = model_input.iloc[:, 0].tolist()
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ConfigError("a prompt is no text", where="model_input", found=repr(prompt)[:80])
        return self._model.generate(prompts, **(params or {}))


set_model(SamplingModel())
