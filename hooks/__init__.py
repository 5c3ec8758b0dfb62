"""The hooks: what plugins may implement (`specs`), and the built-in plugin (`builtin`)."""
