"""Runs one trial: no Ray, no MLflow, no Hydra here."""
