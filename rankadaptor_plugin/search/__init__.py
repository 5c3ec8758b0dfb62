"""The package search."""
