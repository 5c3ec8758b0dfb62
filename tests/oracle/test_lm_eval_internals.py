"""What the package uses of lm-eval beyond its public interface is still there."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter

import pytest

from rankadaptor_plugin.oracle.lm_eval_internals import INTERNALS


@pytest.mark.parametrize(("name", "purpose"), INTERNALS.items())
def test_lm_eval_has_what_is_used(name, purpose):
    module, path, *parameter = name.split(":")
    broken = f"lm-eval has changed {name}. Without it this breaks: {purpose}."
    try:
        used = importlib.import_module(module)
        *owner, last = path.split(".")
        used = attrgetter(".".join(owner))(used) if owner else used
        source = "" if hasattr(used, last) else inspect.getsource(used)  # set on instances alone
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{broken} ({error})")
    assert hasattr(used, last) or f"self.{last}" in source, broken
    if parameter:
        assert parameter[0] in inspect.signature(getattr(used, last)).parameters, broken
