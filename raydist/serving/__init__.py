"""Exported models where others find and load them: as texts in, texts out, and as versions in MLflow's model registry."""
