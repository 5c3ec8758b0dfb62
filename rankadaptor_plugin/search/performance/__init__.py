"""Models Q that predict the score of an allocation, and their proposals.

`performance_model` is their interface; `mlp` the paper's network; `linear` Bayesian linear
regression, which proposes by `ascent` on a `landscape`, within the limits of the rank space.
"""
