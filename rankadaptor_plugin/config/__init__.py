"""The run file: settings, presets, reading and writing.

`tables` has one frozen dataclass per table, with the help text, range and aliases of every key;
`recipes` has the presets; `run_file` reads a file and `template` writes a commented one.
"""
