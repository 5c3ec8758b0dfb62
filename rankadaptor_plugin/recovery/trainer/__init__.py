"""The package trainer."""
