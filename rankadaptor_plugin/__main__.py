"""Lets ``python -m rankadaptor_plugin`` stand for the ``rankadaptor-plugin`` command."""

from __future__ import annotations

from rankadaptor_plugin.cli import main

main()
