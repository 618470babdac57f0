"""The evidence of one arm as files: all that an attacker could hold, and what each attack of it is given.

A store is a folder. The worker never sees it: it gets a folder of its own with the files that its attacks are granted.
A store that is kept can be attacked again, without either party.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen
from safetensors.torch import save_file
from torch import Tensor, nn

from vflair_core.attacks.attack import Launch
from vflair_core.attacks.knowledge import AUXILIARY, DEFENSE
from vflair_core.attacks.observables import Capture
from vflair_core.errors import AttackError
from vflair_core.offers import options_of, target_of
from vflair_core.parties.data_party.party import DataParty
from vflair_core.parties.model_party.party import ModelParty
from vflair_core.partition.adapters import plain_state

FACTS = "facts.json"
HALVES = {"head", "tail", "pretrained_head", "pretrained_tail", "current_head", "current_tail"}
FILES = {  # what else there is, and the knowledge that asks for it
    "tokenizer": {"tokenizer", "replacement"},
    "pretrained.safetensors": HALVES - {"current_head", "current_tail"} | {"pretrained_model"},
    "current.safetensors": HALVES - {"pretrained_head", "pretrained_tail"},
    "body.safetensors": {"body"},
    "embeddings.safetensors": {"embeddings", "replacement"},
    "defenses.safetensors": set(DEFENSE),
    "queries-main.safetensors": {"queries"},
    "queries-bypassed.safetensors": {"queries"},
    "updates-main.safetensors": {"updates"},
    "updates-bypassed.safetensors": {"updates"},
    "adversary.safetensors": {"adversary_state"},
}
GRANTS = {  # files that need one of these grants besides, whatever was asked for
    "current.safetensors": {"current_head", "current_tail"},
    "defenses.safetensors": {"parameters"},
}


@frozen(eq=False)
class Evidence:
    """What an attacker could hold: two passes of messages, weights, and auxiliary data.

    Passes are called main and, with the defense bypassed, bypassed; `victims` has how many cross in each.
    """

    party: DataParty
    model_party: ModelParty
    pretrained: dict[str, Tensor]
    main: Capture
    bypassed: Capture | None
    releases: int
    task_kind: str
    victims: Mapping[str, int]
    seed: int = 0
    auxiliary: dict[str, Any] = field(factory=dict)
    queries: Mapping[str, Capture] = field(factory=dict)
    adversary: Mapping[str, Tensor] | None = None  # what the active one kept, if there was one
    update_batch: int = 1

    @property
    def passes(self) -> dict[str, Capture]:
        """What crossed in each pass over the victims."""
        return {"main": self.main} | ({"bypassed": self.bypassed} if self.bypassed else {})


def needed(launches: Sequence[Launch]) -> set[str]:
    """Files that the attacks ask for and are granted."""
    granted = {name for launch in launches for name in launch.granted}
    asked = asked_names(launches)
    return {
        file
        for file, names in FILES.items()
        if names & asked and (file not in GRANTS or GRANTS[file] & granted)
    }


def asked_names(launches: Sequence[Launch]) -> set[str]:
    """Names that some of the attacks ask for and some are granted."""
    names = {name for launch in launches for name in (*launch.required, *launch.optional)}
    return names & {name for launch in launches for name in launch.granted}


def save_evidence(
    store: Path, evidence: Evidence, files: Collection[str] = frozenset(FILES)
) -> None:
    """Write the messages and `files`, by default everything, into the folder `store`, which is made."""
    store.mkdir(parents=True, exist_ok=True)
    party, model = evidence.party, evidence.party.model
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.tie_word_embeddings and not party.untied
    config.to_json_file(store / "config.json", use_diff=False)
    queries = {f"queries-{which}": crossed for which, crossed in evidence.queries.items()}
    crossings = evidence.passes | queries
    for which, crossed in crossings.items():
        crossed.transcript.save(store / f"{which}.safetensors")
    for which, crossed in evidence.passes.items():
        each = enumerate(crossed.updates)
        flat = {f"{n}.{name}": grad for n, row in each for name, grad in row.items()}
        if flat:
            _save_weights(store / f"updates-{which}.safetensors", flat)
    if "tokenizer" in files and party.tokenizer is not None:
        party.tokenizer.save_pretrained(store / "tokenizer")  # type: ignore[attr-defined]
    for file in files:
        if (weights := _weights(file, evidence)) is not None:
            _save_weights(store / file, weights)
    facts = {
        "releases": dict.fromkeys(evidence.victims, evidence.releases),
        "victims": dict(evidence.victims),
        "spots": {w: [attrs.astuple(spot) for spot in c.spots] for w, c in crossings.items()},
        "update_batch": evidence.update_batch,
        "partition": attrs.asdict(party.partition),
        "task_kind": evidence.task_kind,
        "model_class": type(model).__mro__[1].__name__,
        "defenses": [_told(defense) for defense in party.defenses.each],
        "auxiliary": evidence.auxiliary,
        "seed": evidence.seed,
        "digests": _digests(store),
    }
    (store / FACTS).write_text(json.dumps(facts))


def _weights(file: str, evidence: Evidence) -> dict[str, Tensor] | None:
    """The tensors of one of the files of weights; None for another file."""
    party = evidence.party
    match file:
        case "pretrained.safetensors":
            return evidence.pretrained
        case "body.safetensors":
            return plain_state(evidence.model_party.model)
        case "current.safetensors":
            return {**plain_state(party.model), **plain_state(evidence.model_party.model)}
        case "embeddings.safetensors":
            return {"embeddings": evidence.pretrained[_embedding_name(party.model)]}
        case "defenses.safetensors":
            each = enumerate(party.defenses.each)
            return {f"{n}.{k}": v for n, defense in each for k, v in defense.state().items()}
        case "adversary.safetensors":
            return None if evidence.adversary is None else dict(evidence.adversary)
        case _:
            return None


def read_facts(store: Path) -> dict[str, Any]:
    """Read what is known of the arm beside tensors."""
    facts: dict[str, Any] = json.loads((store / FACTS).read_text())
    return facts


def check_unchanged(store: Path) -> None:
    """See that the files of a kept store are those that the run wrote.

    Raises:
        AttackError: One was changed or lost since.
    """
    written, there = read_facts(store)["digests"], _digests(store)
    changed = sorted(name for name in written if written[name] != there.get(name))
    if changed:
        raise AttackError(
            f"{', '.join(changed)} in {store} is not what the run wrote, so a grade would be of something else. Run the "
            "experiment again with --keep-evidence."
        )


def _digests(store: Path) -> dict[str, str]:
    """A digest of each tensor file."""
    files = sorted(store.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_held(store: Path, launch: Launch) -> None:
    """See that the store holds what an attack cannot do without.

    Raises:
        AttackError: It does not: the run did not make it.
    """
    made = read_facts(store)["auxiliary"]
    for name in launch.required:
        files = [
            f
            for f, names in FILES.items()
            if names - {"replacement"} == {name} and "bypassed" not in f
        ]
        lacks = any(not (store / file).exists() for file in files)
        if lacks or (name in AUXILIARY and name not in made):
            raise AttackError(
                f"{launch.name} needs {name}, which this run did not make. Run the experiment again with it (see "
                "[victims] and [adversary]), or choose another attack."
            )


def _told(defense: Any) -> dict[str, Any]:
    """A defense as an adaptive attacker builds it again; without options if it has no fields to read them from."""
    return {"target": target_of(defense), "options": options_of(defense)}


def _embedding_name(model: nn.Module) -> str:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return next(f"{name}.weight" for name, m in model.named_modules() if m is embeddings)


def _save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    save_file({k: v.detach().clone().contiguous() for k, v in weights.items() if v.numel()}, path)
