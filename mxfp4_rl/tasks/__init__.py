"""Verifiable tasks to train on, and the models that ship with the package."""
