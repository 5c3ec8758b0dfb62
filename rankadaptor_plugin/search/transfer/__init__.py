"""Learning from finished studies of other tasks and models.

`studies` reads them and keeps them in one file, `shared_effects` is the statistics of what they
have in common, and `transfer` turns that into expectations of the ranks of another space.
"""
