"""The package performance."""
