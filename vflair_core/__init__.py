"""vflair: split learning of large language models that people can trust and extend.

Names load on first use (PEP 562), so that ``vflair --help`` and plugin modules never import torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
logging.getLogger(__name__).addHandler(logging.NullHandler())  # who listens adds another

_HOMES = {
    "Channel": "communication.channel",
    "LocalChannel": "communication.channel",
    "ByteChannel": "communication.byte_channel",
    "answer": "communication.byte_channel",
    "Stepwise": "communication.stepwise",
    "connect": "communication.remote.client",
    "GrpcChannel": "communication.remote.client",
    "serve": "communication.remote.server",
    "Server": "communication.remote.server",
    "ServerLimits": "communication.remote.served_stream",
    "Served": "communication.remote.served_stream",
    "Client": "communication.remote.rights",
    "Admission": "communication.remote.admission",
    "IssuedTokens": "communication.remote.issued_tokens",
    "init_authority": "communication.remote.certificates",
    "Transcript": "communication.transcript",
    "Message": "communication.message",
    "Partition": "partition.partition",
    "split": "parties.split",
    "join": "parties.split",
    "divide": "parties.divide",
    "load_data_party": "parties.load",
    "load_model_party": "parties.load",
    "locate_checkpoint": "parties.checkpoint_files",
    "merge": "parties.merge",
    "verify": "parties.verify",
    "Defense": "defenses.defense",
    "Guarantee": "defenses.guarantee",
    "Adversary": "attacks.adversary",
    "Guess": "attacks.attack",
    "Task": "tasks.task",
    "TaskCard": "tasks.task",
    "Example": "tasks.task",
    "VflairError": "errors",
    "PartitionError": "errors",
    "SecondDerivativeError": "errors",
    "LeakError": "errors",
    "CheckpointError": "errors",
    "ProtocolError": "errors",
    "SessionLostError": "errors",
    "BusyError": "errors",
    "ChannelError": "errors",
    "DefenseError": "errors",
    "AttackError": "errors",
    "TaskError": "errors",
    "hookimpl": "hookspecs",
    "API_VERSION": "hookspecs",
    "DeprecatedHookWarning": "hookspecs",
    "plugin_manager": "plugins",
    "Experiment": "experiments.experiment",
    "read_experiment": "experiments.config",
    "run": "experiments.run",
    "study": "experiments.studies.study",
    "read_grid": "experiments.studies.grid",
    "read_study": "experiments.studies.assembly",
    "Cell": "experiments.studies.cell",
    "Plan": "experiments.studies.grid",
    "grade_rows": "experiments.studies.records",
    "arm_rows": "experiments.studies.records",
    "trial_rows": "experiments.studies.records",
    "submit": "experiments.studies.submission",
    "read_submission": "experiments.studies.submission",
    "Rules": "experiments.studies.rules",
    "verify_result": "experiments.studies.verification",
    "tune": "training.tuning",
    "load_adapter": "parties.load_adapter",
    "Lora": "training.tuning",
    "FineTuning": "training.fine_tuning",
    "Train": "training.fine_tuning",
    "SplitCallback": "training.trainer_callback",
    "Result": "experiments.result",
    "DataParty": "parties.data_party.party",
    "ModelParty": "parties.model_party.party",
    "Blocks": "partition.partition",
    "Exchange": "defenses.defense",
    "Mechanism": "defenses.mechanism",
    "Replacement": "defenses.mechanism",
    "Head": "attacks.halves",
    "Tail": "attacks.halves",
    "halves": "attacks.halves",
    "TaskKind": "tasks.kinds",
    "Score": "tasks.task",
    "Span": "tasks.task",
    "Batch": "tasks.collation",
    "Replaced": "tasks.spans",
    "WORD": "tasks.spans",
    "Chat": "tasks.task",
    "in_chat": "tasks.chat",
    "takes_system": "tasks.chat",
    "exact_match": "tasks.metrics",
    "token_f1": "tasks.metrics",
    "cache_argument": "communication.cache_kinds",
    "did_you_mean": "errors",
    "alternatives": "errors",
    "train_tokenizer": "tasks.tokenizer_training",
    "launch": "attacks.attack",
    "experiment_from": "experiments.config",
    "attack_again": "experiments.attack_phase",
    "AttackSpec": "experiments.experiment",
    "run_cuts": "experiments.cut_sweep",
    "Tracker": "experiments.tracker",
    "Logbook": "experiments.tracker",
    "write_report": "experiments.reports.page",
    "write_tables": "experiments.reports.tables",
    "write_figures": "experiments.reports.figures",
    "ExperimentError": "errors",
    "PluginError": "errors",
    "Party": "defenses.defense",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the table is the one list of names


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vflair_core' has no attribute {name!r}")
    return getattr(import_module(f"vflair_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from vflair_core.attacks.adversary import Adversary as Adversary
    from vflair_core.attacks.attack import Guess as Guess
    from vflair_core.attacks.attack import launch as launch
    from vflair_core.attacks.halves import Head as Head
    from vflair_core.attacks.halves import Tail as Tail
    from vflair_core.attacks.halves import halves as halves
    from vflair_core.communication.byte_channel import ByteChannel as ByteChannel
    from vflair_core.communication.byte_channel import answer as answer
    from vflair_core.communication.cache_kinds import cache_argument as cache_argument
    from vflair_core.communication.channel import Channel as Channel
    from vflair_core.communication.channel import LocalChannel as LocalChannel
    from vflair_core.communication.message import Message as Message
    from vflair_core.communication.remote.admission import Admission as Admission
    from vflair_core.communication.remote.certificates import init_authority as init_authority
    from vflair_core.communication.remote.client import GrpcChannel as GrpcChannel
    from vflair_core.communication.remote.client import connect as connect
    from vflair_core.communication.remote.issued_tokens import IssuedTokens as IssuedTokens
    from vflair_core.communication.remote.rights import Client as Client
    from vflair_core.communication.remote.served_stream import Served as Served
    from vflair_core.communication.remote.served_stream import ServerLimits as ServerLimits
    from vflair_core.communication.remote.server import Server as Server
    from vflair_core.communication.remote.server import serve as serve
    from vflair_core.communication.stepwise import Stepwise as Stepwise
    from vflair_core.communication.transcript import Transcript as Transcript
    from vflair_core.defenses.defense import Defense as Defense
    from vflair_core.defenses.defense import Exchange as Exchange
    from vflair_core.defenses.defense import Party as Party
    from vflair_core.defenses.guarantee import Guarantee as Guarantee
    from vflair_core.defenses.mechanism import Mechanism as Mechanism
    from vflair_core.defenses.mechanism import Replacement as Replacement
    from vflair_core.errors import AttackError as AttackError
    from vflair_core.errors import BusyError as BusyError
    from vflair_core.errors import ChannelError as ChannelError
    from vflair_core.errors import CheckpointError as CheckpointError
    from vflair_core.errors import DefenseError as DefenseError
    from vflair_core.errors import ExperimentError as ExperimentError
    from vflair_core.errors import LeakError as LeakError
    from vflair_core.errors import PartitionError as PartitionError
    from vflair_core.errors import PluginError as PluginError
    from vflair_core.errors import ProtocolError as ProtocolError
    from vflair_core.errors import SecondDerivativeError as SecondDerivativeError
    from vflair_core.errors import SessionLostError as SessionLostError
    from vflair_core.errors import TaskError as TaskError
    from vflair_core.errors import VflairError as VflairError
    from vflair_core.errors import alternatives as alternatives
    from vflair_core.errors import did_you_mean as did_you_mean
    from vflair_core.experiments.attack_phase import attack_again as attack_again
    from vflair_core.experiments.config import experiment_from as experiment_from
    from vflair_core.experiments.config import read_experiment as read_experiment
    from vflair_core.experiments.cut_sweep import run_cuts as run_cuts
    from vflair_core.experiments.experiment import AttackSpec as AttackSpec
    from vflair_core.experiments.experiment import Experiment as Experiment
    from vflair_core.experiments.reports.figures import write_figures as write_figures
    from vflair_core.experiments.reports.page import write_report as write_report
    from vflair_core.experiments.reports.tables import write_tables as write_tables
    from vflair_core.experiments.result import Result as Result
    from vflair_core.experiments.run import run as run
    from vflair_core.experiments.studies.assembly import read_study as read_study
    from vflair_core.experiments.studies.cell import Cell as Cell
    from vflair_core.experiments.studies.grid import Plan as Plan
    from vflair_core.experiments.studies.grid import read_grid as read_grid
    from vflair_core.experiments.studies.records import arm_rows as arm_rows
    from vflair_core.experiments.studies.records import grade_rows as grade_rows
    from vflair_core.experiments.studies.records import trial_rows as trial_rows
    from vflair_core.experiments.studies.rules import Rules as Rules
    from vflair_core.experiments.studies.study import study as study
    from vflair_core.experiments.studies.submission import read_submission as read_submission
    from vflair_core.experiments.studies.submission import submit as submit
    from vflair_core.experiments.studies.verification import verify_result as verify_result
    from vflair_core.experiments.tracker import Logbook as Logbook
    from vflair_core.experiments.tracker import Tracker as Tracker
    from vflair_core.hookspecs import API_VERSION as API_VERSION
    from vflair_core.hookspecs import DeprecatedHookWarning as DeprecatedHookWarning
    from vflair_core.hookspecs import hookimpl as hookimpl
    from vflair_core.parties.checkpoint_files import locate_checkpoint as locate_checkpoint
    from vflair_core.parties.data_party.party import DataParty as DataParty
    from vflair_core.parties.divide import divide as divide
    from vflair_core.parties.load import load_data_party as load_data_party
    from vflair_core.parties.load import load_model_party as load_model_party
    from vflair_core.parties.load_adapter import load_adapter as load_adapter
    from vflair_core.parties.merge import merge as merge
    from vflair_core.parties.model_party.party import ModelParty as ModelParty
    from vflair_core.parties.split import join as join
    from vflair_core.parties.split import split as split
    from vflair_core.parties.verify import verify as verify
    from vflair_core.partition.partition import Blocks as Blocks
    from vflair_core.partition.partition import Partition as Partition
    from vflair_core.plugins import plugin_manager as plugin_manager
    from vflair_core.tasks.chat import in_chat as in_chat
    from vflair_core.tasks.chat import takes_system as takes_system
    from vflair_core.tasks.collation import Batch as Batch
    from vflair_core.tasks.kinds import TaskKind as TaskKind
    from vflair_core.tasks.metrics import exact_match as exact_match
    from vflair_core.tasks.metrics import token_f1 as token_f1
    from vflair_core.tasks.spans import WORD as WORD
    from vflair_core.tasks.spans import Replaced as Replaced
    from vflair_core.tasks.task import Chat as Chat
    from vflair_core.tasks.task import Example as Example
    from vflair_core.tasks.task import Score as Score
    from vflair_core.tasks.task import Span as Span
    from vflair_core.tasks.task import Task as Task
    from vflair_core.tasks.task import TaskCard as TaskCard
    from vflair_core.tasks.tokenizer_training import train_tokenizer as train_tokenizer
    from vflair_core.training.fine_tuning import FineTuning as FineTuning
    from vflair_core.training.fine_tuning import Train as Train
    from vflair_core.training.trainer_callback import SplitCallback as SplitCallback
    from vflair_core.training.tuning import Lora as Lora
    from vflair_core.training.tuning import tune as tune
