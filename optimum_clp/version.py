"""The version of this package, alone in a module so that the build can read it without importing anything."""

__version__ = "0.2.0"
