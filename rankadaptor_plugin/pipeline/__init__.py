"""The package pipeline."""
