"""The embedded model and its tasks, made from a seed."""
