"""The package report."""
