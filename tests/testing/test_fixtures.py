"""The fixtures are there wherever vflair-core is installed, and are what they say; a cut model is compared with the whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attrs import define

from vflair_core import Defense, Partition
from vflair_core.testing import assert_split_equals, tiny_batch, tiny_model


@define
class Twice(Defense):
    covers = frozenset({"prompt"})
    by: float = 2.0

    def on_smashed(self, smashed, exchange):
        return self.by * smashed


def test_two_parties_in_this_process_and_in_two_give_what_the_model_gives(
    vflair_parties, vflair_remote_parties, vflair_model
):
    batch = tiny_batch(vflair_model, labels="tokens")
    expected = vflair_model(**batch).logits
    for make in (vflair_parties, vflair_remote_parties):
        parties = make(vflair_model, Partition(1, 1))
        assert torch.equal(parties.data_party.model(**batch).logits, expected)
    assert parties.remote.process.poll() is None


def test_a_remote_model_party_ends_with_its_test():
    from vflair_core.testing import remote_model_party

    pytest.importorskip("grpc")
    with remote_model_party(tiny_model("gpt2"), Partition(1, 1)) as remote:
        assert remote.process.poll() is None
    assert remote.process.poll() == 0


def test_what_crosses_is_captured_after_every_defense(vflair_parties, vflair_captured):
    sent = []
    for defenses in ([], [Twice()]):
        data_party = vflair_parties(defenses=defenses).data_party
        captured = vflair_captured(data_party)
        with torch.no_grad():
            data_party.model(**tiny_batch(data_party.model))
        sent += [r.tensor for r in captured.messages if r.role == "smashed"]
    assert torch.equal(sent[1], 2 * sent[0])


def test_the_real_model_is_real(vflair_real_model):
    model, tokenizer = vflair_real_model
    said = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"),
        max_new_tokens=1,
        do_sample=False,
    )
    assert tokenizer.decode(said[0]).endswith(" Paris")


def test_other_suites_import_no_torch_for_it(tmp_path):
    """The plugin is loaded by every pytest of an environment."""
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_light():\n    assert 'torch' not in sys.modules\n"
        "    assert 'vflair_core.testing.fixtures' in sys.modules\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("cut", [Partition(1, 1), Partition(2, 0), Partition(0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_cut_model_equals_the_whole_one(kind, cut):
    model = tiny_model(kind)
    assert_split_equals(model, cut, tiny_batch(model, padding="left", labels="tokens"))


def test_classes_too_and_with_a_defense_that_is_off():
    model = tiny_model("bert", "classification", num_labels=3)
    batch = tiny_batch(model, labels="classes")
    assert_split_equals(model, Partition(1, 1), batch, defenses=[Twice(1.0)])


@define
class ChangesTheWayBack(Defense):
    covers = frozenset({"gradients"})

    def on_gradient(self, gradient, exchange):
        return 1.01 * gradient


@pytest.mark.parametrize(
    ("defense", "what"), [(Twice(), "its logits are not"), (ChangesTheWayBack(), "its gradients")]
)
def test_a_difference_is_named(defense, what):
    model = tiny_model("llama")
    with pytest.raises(AssertionError, match=what):
        assert_split_equals(
            model, Partition(1, 1), tiny_batch(model, labels="tokens"), defenses=[defense]
        )


def test_what_cannot_be_compared_is_refused_in_words():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="has no labels"):
        assert_split_equals(model, Partition(1, 1), tiny_batch(model))
    batch = tiny_batch(model, labels="tokens")
    with pytest.raises(ValueError, match="No weight of the model is trained"):
        assert_split_equals(model.requires_grad_(False), Partition(1, 1), batch)


def test_less_can_be_granted(vflair_knowledge):
    assert "smashed" in vflair_knowledge(knowledge="K0")
    assert "embeddings" not in vflair_knowledge(knowledge="K0")
