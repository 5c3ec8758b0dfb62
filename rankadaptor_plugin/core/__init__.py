"""Words and files that all packages share; imports nothing else of this project.

Errors, the registry, rank allocations and rank spaces (`ranks`), scores and per-document results,
trials, and the run folder, in which every file is written whole or not at all.
"""
