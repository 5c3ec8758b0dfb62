"""The package corpus."""
