"""The package methods."""
