"""One run, from run file to adapter: prepare, prune, evaluate, search, confirm and report.

`run` connects the stages, `stage` is the built-in recovery stage, `context` has what stages and
plugins exchange, and `commands` are the commands of the program. Every stage leaves files in the
run folder, so that the same command resumes an interrupted run.
"""
