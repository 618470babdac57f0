"""Every hook a vflair plugin may implement. Torch-free, so that plugin modules stay cheap to import.

Three kinds, kept apart: *contribute* hooks offer names, *decide* hooks answer a question the core
cannot answer, *observe* hooks watch. Installing a plugin never changes a number: the experiment names
what it uses.

A hook is stable unless it is in `EXPERIMENTAL`: what changes for plugins raises `API_VERSION`, and a stable hook that is
to go is `deprecated` for two minor versions before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch

    from vflair_core.communication.channel import Channel
    from vflair_core.experiments.experiment import Experiment
    from vflair_core.experiments.result import Result
    from vflair_core.partition.partition import Blocks, Partition

PROJECT = "vflair"
API_VERSION = 1  # what a plugin can ask for by VFLAIR_API; raised when plugins must change
OLDEST_API = 1  # the oldest that still works
EXPERIMENTAL = frozenset({"vflair_partition", "vflair_place"})  # may change in any version
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class DeprecatedHookWarning(FutureWarning):
    """A plugin implements a hook, or takes an argument of one, that will go."""


def deprecated(name: str, *, instead: str, until: str) -> Any:
    """Mark a hook that is still called and will go, so that whoever implements it is warned.

    Args:
        name: The hook.
        instead: What to implement in its place.
        until: The version of vflair-core that calls it no more, two minor versions on.
    """
    text = f"{name} is called no more from vflair-core {until} on: implement {instead} instead."
    return hookspec(warn_on_impl=DeprecatedHookWarning(text))


Offer = Mapping[str, Callable[..., Any] | str]


class Contribute:
    """Hooks that offer something by name; a value is a callable or ``"module:attr"``, imported on use."""

    @hookspec
    def vflair_attacks(self) -> Offer:  # type: ignore[empty-body]
        """Offer attacks: name → attack class or function."""

    @hookspec
    def vflair_defenses(self) -> Offer:  # type: ignore[empty-body]
        """Offer defenses: name → `Defense` class."""

    @hookspec
    def vflair_tasks(self) -> Offer:  # type: ignore[empty-body]
        """Offer tasks: name → function that returns a `Task`; its keyword arguments are the options."""

    @hookspec
    def vflair_commands(self) -> Offer:  # type: ignore[empty-body]
        """Offer commands of the ``vflair`` program: name → function with annotated arguments."""


class Decide:
    """Hooks asked only where the core has no answer; two answers are an error that names both."""

    @hookspec
    def vflair_locate_blocks(self, model: torch.nn.Module) -> Blocks | None:
        """Say where the blocks of a model lie that the core cannot place; None to pass."""

    @hookspec
    def vflair_partition(self, model: torch.nn.Module, partition: Partition) -> Partition | None:
        """Choose the cut when the experiment names this plugin as its ``partition_plugin``; None takes its partition."""

    @hookspec
    def vflair_open_channel(self, url: str, options: Mapping[str, Any]) -> Channel | None:
        """Open a channel the core does not know. `options`: the model party's handle, wire, wire_dtype. None to pass."""

    @hookspec
    def vflair_place(self, model_party: torch.nn.Module, devices: list[str]) -> bool | None:
        """Place the model party's modules on `devices` when there are several; True when done."""


class Observe:
    """Hooks that watch. Results are ignored, tensors are copies, and an observer that raises is named.

    `arm` is the arm of the experiment: undefended, defended, or one of them under an active adversary.
    """

    @hookspec
    def vflair_run_started(self, experiment: Experiment) -> None:
        """Called once before anything is built."""

    @hookspec
    def vflair_run_finished(self, result: Result) -> None:
        """Called once with the finished result."""

    @hookspec
    def vflair_run_failed(self, experiment: Experiment, error: BaseException) -> None:
        """Called once when a run ends in an error, which is then raised."""

    @hookspec
    def vflair_arm_started(self, arm: str, seed: int) -> None:
        """Called before an arm is cut; with several seeds each arm runs once with each."""

    @hookspec
    def vflair_model_partitioned(
        self, partition: Partition, data_party_weights: int, model_party_weights: int
    ) -> None:
        """Called after each split, with the number of weights each party owns."""

    @hookspec
    def vflair_message_sent(
        self, arm: str, kind: str, role: str, direction: str, step: int, nbytes: int, seconds: float
    ) -> None:
        """Called per tensor that the data party sent; `seconds` is the whole exchange's time."""

    @hookspec
    def vflair_message_received(
        self, arm: str, kind: str, role: str, direction: str, step: int, nbytes: int, seconds: float
    ) -> None:
        """Called per tensor that the data party received; `seconds` is the whole exchange's time."""

    @hookspec
    def vflair_step_started(self, arm: str, step: int) -> None:
        """Called before each optimizer step."""

    @hookspec
    def vflair_step_finished(self, arm: str, step: int, loss: float) -> None:
        """Called after each optimizer step with its training loss (nats)."""

    @hookspec
    def vflair_epoch_finished(self, arm: str, epoch: int, step: int) -> None:
        """Called after each pass over the training examples."""

    @hookspec
    def vflair_evaluated(self, arm: str, step: int, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation on the test examples."""

    @hookspec
    def vflair_checkpoint_saved(self, arm: str, path: str, step: int) -> None:
        """Called after a party wrote its checkpoint."""

    @hookspec
    def vflair_attack_finished(self, arm: str, name: str, grade: Mapping[str, Any]) -> None:
        """Called after each graded attack."""


KINDS = (Contribute, Decide, Observe)
