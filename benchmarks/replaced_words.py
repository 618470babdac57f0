"""Words behind replaced words: how many are right as they were sent, and how many by their posterior.

Each defense of text changes 200 pieces of the Python manual; words outside its vocabulary are left out of the count. Blind is
who takes every word for the one that was meant; informed is `replacement-inversion` with the defense's own probabilities and the
public part of the manual as prior. Both read the text that was sent without an error: no hidden state is inverted here.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from vflair_attacks.replaced_words import ReplacementInversion
from vflair_core.experiments.build import build_run
from vflair_core.experiments.studies.grid import read_grid
from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition
from vflair_core.plugins import plugin_manager
from vflair_core.tasks.spans import WORD, Replaced
from vflair_defenses.custext import CusText, custext_plus
from vflair_defenses.rantext import RanText
from vflair_defenses.santext import SanText, SanTextPlus

DEFENSES = {
    "santext": SanText,
    "santext-plus": SanTextPlus,
    "custext": CusText,
    "custext-plus": custext_plus,
    "rantext": RanText,
}
WORDS = 40  # of each text
STUDY = Path(__file__).parent.parent / "examples" / "studies" / "matched-words.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilons", type=float, nargs="*", default=[0.1, 1.0, 10.0, 100.0])
    parser.add_argument("--texts", type=int, default=200)
    options = parser.parse_args()
    e = read_grid(STUDY)[0].experiment
    torch.set_num_threads(e.threads)
    setting, model = build_run(e, plugin_manager())
    task, table = setting.task, model.get_input_embeddings().weight.detach()
    count = min(options.texts, len(task.train))
    texts = [" ".join(task.row("train", n).text.split()[:WORDS]) for n in range(count)]
    print("defense | ε | words | blind | informed")
    for name, make in DEFENSES.items():
        for epsilon in options.epsilons:
            defense = make(epsilon=epsilon, spacing=False)
            party, _ = split(
                copy.deepcopy(model), Partition(1, 1), defenses=[defense], tokenizer=setting.tokenizer, seed=0
            )  # fmt: skip
            defense.prepare(task.public, party)
            told = make(epsilon=epsilon).replacement(setting.tokenizer, table, task.public)
            sent = [defense.on_text({"text": text})["text"] for text in texts]
            found = ReplacementInversion().before(sent, told, task.public)
            counted = [t for triple in zip(texts, sent, found, strict=True) for t in words(*triple)]
            known = [row for row in counted if row[0] in set(told.words)]
            blind = sum(true == read for true, read, _ in known) / len(known)
            informed = sum(true == guess for true, _, guess in known) / len(known)
            print(f"{name} | {epsilon:g} | {len(known)} | {blind:.3f} | {informed:.3f}", flush=True)


def words(text: str, sent: Replaced, found: str) -> list[tuple[str, str, str]]:
    """Each word, what was sent for it, and what it was taken for."""
    true = [text[slice(*old)] for old, _ in sent.pieces]
    return list(zip(true, WORD.findall(sent), WORD.findall(found), strict=True))


if __name__ == "__main__":
    main()
