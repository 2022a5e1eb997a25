"""The version of the package, which saved models, atlases and training records name."""

__version__ = "0.2.0.dev0"
