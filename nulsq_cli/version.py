"""The version, read by the build and printed by `nulsq --version`."""

__version__ = "0.1.0"
