"""A plugin of another distribution, for tests: a pruner, and a recovery stage."""
