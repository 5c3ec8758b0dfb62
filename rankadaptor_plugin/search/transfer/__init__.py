"""The package transfer."""
