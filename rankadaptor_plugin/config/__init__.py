"""The run file: settings, presets, reading and writing.

`tables` has one frozen dataclass per table, with the help text, range and aliases of every key;
`recipes` has the presets; `run_file` reads a file, `template` writes one for a model, and `schema`
describes it to editors.
"""
