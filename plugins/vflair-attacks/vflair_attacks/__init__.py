"""Attacks on split learning of language models: the table of contents.

| name | file | needs |
|---|---|---|
| vocabulary-search | vocabulary_search.py | smashed data, a head |
| greedy-search | vocabulary_search.py | smashed data, a head |
| nearest-embedding | nearest_embedding.py | smashed data, the embedding table |
| vmi | vmi.py | smashed data, a head |
| patch-inversion | patch_inversion.py | smashed data, a causal head |
| inverter | inverter.py, learning.py | smashed data; public text and a head, or queries |
| bisr | bisr.py, noise_experts.py, learning.py | smashed data, a head, public text; gradients of HBT training |
| wbi | wbi.py | smashed data, a head |
| coordinate-search | coordinate_search.py, matching.py | smashed data, a head, also an encoder |
| beam-clean | beam_clean.py, priors.py | noisy smashed data, a causal head or the embedding table |
| model-completion | model_completion.py | returned states and a tail, or logits |
| joint-inversion | model_completion.py, priors.py | smashed data and a causal head; returned states and a tail |
| gradient-sign | gradient_sign.py | the gradient of the logits (HT training) |
"""

from vflair_core import hookimpl


@hookimpl
def vflair_attacks() -> dict[str, str]:
    """Offer all attacks; each is imported on first use."""
    return {
        "vocabulary-search": "vflair_attacks.vocabulary_search:VocabularySearch",
        "greedy-search": "vflair_attacks.vocabulary_search:GreedySearch",
        "nearest-embedding": "vflair_attacks.nearest_embedding:NearestEmbedding",
        "vmi": "vflair_attacks.vmi:ModelInversion",
        "patch-inversion": "vflair_attacks.patch_inversion:PatchInversion",
        "inverter": "vflair_attacks.inverter:LearnedInverter",
        "bisr": "vflair_attacks.bisr:BiSR",
        "wbi": "vflair_attacks.wbi:WhiteBoxInversion",
        "coordinate-search": "vflair_attacks.coordinate_search:CoordinateSearch",
        "beam-clean": "vflair_attacks.beam_clean:BeamClean",
        "model-completion": "vflair_attacks.model_completion:ModelCompletion",
        "joint-inversion": "vflair_attacks.model_completion:JointInversion",
        "gradient-sign": "vflair_attacks.gradient_sign:GradientSign",
    }
