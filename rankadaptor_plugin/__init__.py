"""Per-layer LoRA ranks for recovering pruned LLMs (RankAdaptor, arXiv 2406.15734).

Nothing is re-exported here: import from the module that owns the name, for example
``from rankadaptor_plugin.search.search import search``. Plugins need `hookimpl` alone.
"""

from __future__ import annotations

from pathlib import Path

import pluggy

__version__ = "0.1.0"

hookspec = pluggy.HookspecMarker("rankadaptor_plugin")
hookimpl = pluggy.HookimplMarker("rankadaptor_plugin")

# In a checkout `hooks/` and `tasks/` stand beside this folder; in a wheel they lie inside it.
_here = Path(__file__).resolve().parent
if not (_here / "hooks").is_dir() and (_here.parent / "hooks" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

# Pruned checkpoints then load through AutoModelForCausalLM; this imports neither torch nor
# transformers.
from rankadaptor_plugin.models import registration  # noqa: E402

registration.install()
