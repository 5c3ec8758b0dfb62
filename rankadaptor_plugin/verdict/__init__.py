"""The package verdict."""
