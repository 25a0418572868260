"""Trained models in use: loaded from a run, applied to images of any size."""
