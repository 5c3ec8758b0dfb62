"""Hooks that plugins can implement (`specs`), and the built-in plugin (`builtin`)."""
