"""The package oracle."""
