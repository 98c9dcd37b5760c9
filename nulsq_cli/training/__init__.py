"""Data in, updates out: datasets, loaders and all that trains or evaluates a model."""
