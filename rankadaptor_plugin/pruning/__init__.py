"""The package pruning."""
