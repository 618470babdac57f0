"""For tests of who builds on vflair, and ours: small models, parties, what an attack is granted, and what a plugin owes.

Names load on first use, so that pytest, which loads `fixtures.py` wherever vflair-core is installed, imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "tiny_model": "models",
    "tiny_batch": "models",
    "tiny_tokenizer": "models",
    "numbers_as_texts": "models",
    "crossed": "crossing",
    "everything": "crossing",
    "REAL_MODEL": "real_model",
    "load_real_model": "real_model",
    "remote_model_party": "remote",
    "assert_split_equals": "equality",
    "assert_attack_contract": "attack_contract",
    "assert_defense_contract": "defense_contract",
    "assert_task_contract": "task_contract",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vflair_core.testing' has no attribute {name!r}")
    return getattr(import_module(f"vflair_core.testing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from vflair_core.testing.attack_contract import assert_attack_contract as assert_attack_contract
    from vflair_core.testing.crossing import crossed as crossed
    from vflair_core.testing.crossing import everything as everything
    from vflair_core.testing.defense_contract import (
        assert_defense_contract as assert_defense_contract,
    )
    from vflair_core.testing.equality import assert_split_equals as assert_split_equals
    from vflair_core.testing.models import numbers_as_texts as numbers_as_texts
    from vflair_core.testing.models import tiny_batch as tiny_batch
    from vflair_core.testing.models import tiny_model as tiny_model
    from vflair_core.testing.models import tiny_tokenizer as tiny_tokenizer
    from vflair_core.testing.real_model import REAL_MODEL as REAL_MODEL
    from vflair_core.testing.real_model import load_real_model as load_real_model
    from vflair_core.testing.remote import remote_model_party as remote_model_party
    from vflair_core.testing.task_contract import assert_task_contract as assert_task_contract
