from __future__ import annotations

import importlib
import pkgutil

import pytest

import rankadaptor_plugin

ROOMS = [
    module.name for module in pkgutil.iter_modules(rankadaptor_plugin.__path__) if module.ispkg
]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_of_a_package_is_there_and_no_other(room):
    package = importlib.import_module(f"rankadaptor_plugin.{room}")
    for name in getattr(package, "__all__", ()):
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name
