"""Where metrics, parameters and artifacts go: a file in the run directory always, MLflow as its mirror."""
