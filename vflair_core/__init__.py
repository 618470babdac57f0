"""vflair: split learning of large language models that people can trust and extend.

Names load on first use (PEP 562), so that ``vflair --help`` and plugin modules never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Channel": "channel",
    "LocalChannel": "channel",
    "Transcript": "channel",
    "Message": "message",
    "Partition": "partition",
    "split": "partition",
    "divide": "partition",
    "load_data_party": "loading",
    "load_model_party": "loading",
    "merge": "merging",
    "verify": "verification",
    "Defense": "defense",
    "Guarantee": "guarantee",
    "Adversary": "adversary",
    "Guess": "attack",
    "Task": "task",
    "TaskCard": "task",
    "Example": "task",
    "VflairError": "errors",
    "PartitionError": "errors",
    "LeakError": "errors",
    "CheckpointError": "errors",
    "ProtocolError": "errors",
    "DefenseError": "errors",
    "AttackError": "errors",
    "TaskError": "errors",
    "hookimpl": "hookspecs",
    "plugin_manager": "plugins",
    "Experiment": "experiment",
    "read_experiment": "config",
    "run": "running",
    "tune": "tuning",
    "Lora": "tuning",
    "FineTuning": "training",
    "Train": "training",
    "SplitCallback": "trainer",
    "Result": "result",
    "DataParty": "data_party",
    "ModelParty": "model_party",
    "Blocks": "blocks",
    "Exchange": "defense",
    "Mechanism": "defense",
    "Replacement": "defense",
    "Head": "halves",
    "Tail": "halves",
    "TaskKind": "task",
    "Score": "task",
    "Span": "task",
    "Batch": "defense",
    "Replaced": "spans",
    "WORD": "spans",
    "exact_match": "metrics",
    "token_f1": "metrics",
    "cache_argument": "cache",
    "did_you_mean": "errors",
    "train_tokenizer": "encoding",
    "launch": "attack",
    "experiment_from": "config",
    "attack_again": "arm_attacks",
    "AttackSpec": "experiment",
    "run_cuts": "cuts",
    "ExperimentError": "errors",
    "PluginError": "errors",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the table is the one list of names


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vflair_core' has no attribute {name!r}")
    return getattr(import_module(f"vflair_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from vflair_core.adversary import Adversary as Adversary
    from vflair_core.arm_attacks import attack_again as attack_again
    from vflair_core.attack import Guess as Guess
    from vflair_core.attack import launch as launch
    from vflair_core.blocks import Blocks as Blocks
    from vflair_core.cache import cache_argument as cache_argument
    from vflair_core.channel import Channel as Channel
    from vflair_core.channel import LocalChannel as LocalChannel
    from vflair_core.channel import Transcript as Transcript
    from vflair_core.config import experiment_from as experiment_from
    from vflair_core.config import read_experiment as read_experiment
    from vflair_core.cuts import run_cuts as run_cuts
    from vflair_core.data_party import DataParty as DataParty
    from vflair_core.defense import Batch as Batch
    from vflair_core.defense import Defense as Defense
    from vflair_core.defense import Exchange as Exchange
    from vflair_core.defense import Mechanism as Mechanism
    from vflair_core.defense import Replacement as Replacement
    from vflair_core.encoding import train_tokenizer as train_tokenizer
    from vflair_core.errors import AttackError as AttackError
    from vflair_core.errors import CheckpointError as CheckpointError
    from vflair_core.errors import DefenseError as DefenseError
    from vflair_core.errors import ExperimentError as ExperimentError
    from vflair_core.errors import LeakError as LeakError
    from vflair_core.errors import PartitionError as PartitionError
    from vflair_core.errors import PluginError as PluginError
    from vflair_core.errors import ProtocolError as ProtocolError
    from vflair_core.errors import TaskError as TaskError
    from vflair_core.errors import VflairError as VflairError
    from vflair_core.errors import did_you_mean as did_you_mean
    from vflair_core.experiment import AttackSpec as AttackSpec
    from vflair_core.experiment import Experiment as Experiment
    from vflair_core.guarantee import Guarantee as Guarantee
    from vflair_core.halves import Head as Head
    from vflair_core.halves import Tail as Tail
    from vflair_core.hookspecs import hookimpl as hookimpl
    from vflair_core.loading import load_data_party as load_data_party
    from vflair_core.loading import load_model_party as load_model_party
    from vflair_core.merging import merge as merge
    from vflair_core.message import Message as Message
    from vflair_core.metrics import exact_match as exact_match
    from vflair_core.metrics import token_f1 as token_f1
    from vflair_core.model_party import ModelParty as ModelParty
    from vflair_core.partition import Partition as Partition
    from vflair_core.partition import divide as divide
    from vflair_core.partition import split as split
    from vflair_core.plugins import plugin_manager as plugin_manager
    from vflair_core.result import Result as Result
    from vflair_core.running import run as run
    from vflair_core.spans import WORD as WORD
    from vflair_core.spans import Replaced as Replaced
    from vflair_core.task import Example as Example
    from vflair_core.task import Score as Score
    from vflair_core.task import Span as Span
    from vflair_core.task import Task as Task
    from vflair_core.task import TaskCard as TaskCard
    from vflair_core.task import TaskKind as TaskKind
    from vflair_core.trainer import SplitCallback as SplitCallback
    from vflair_core.training import FineTuning as FineTuning
    from vflair_core.training import Train as Train
    from vflair_core.tuning import Lora as Lora
    from vflair_core.tuning import tune as tune
    from vflair_core.verification import verify as verify
