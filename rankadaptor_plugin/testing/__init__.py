"""Conformance suites for plugin authors: model families, oracles, performance models, samplers.

A test file inherits a suite and defines how its object is created; the built-in objects pass the
same suites.
"""
