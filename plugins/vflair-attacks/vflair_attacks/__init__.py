"""Attacks on split learning of language models: the table of contents.

| name | file | needs |
|---|---|---|
| vocabulary-search | vocabulary_search.py, proposals.py, matching.py, priors.py | smashed data, a head |
| greedy-search | the same | smashed data, a head |
| nearest-embedding | nearest_embedding.py | smashed data, the embedding table |
| vmi | vmi.py | smashed data, a head |
| patch-inversion | patch_inversion.py | smashed data, a causal head |
| inverter | inverter.py, learning.py | smashed data; public text and a head, or queries |
| linear-inverter | linear_inverter.py, inverter.py, learning.py | smashed data; public text and a head, or queries and the embedding table |
| bisr | bisr.py, noise_experts.py, learning.py | smashed data, a head, public text; gradients of HBT training |
| wbi | wbi.py | smashed data, a head |
| coordinate-search | coordinate_search.py, matching.py | smashed data, a head, also an encoder |
| replacement-inversion | replaced_words.py | smashed data, a head or the embedding table; how words are replaced |
| beam-clean | beam_clean.py, priors.py | noisy smashed data, a causal head or the embedding table |
| model-completion | model_completion.py | returned states and a tail, or logits |
| joint-inversion | model_completion.py, priors.py | smashed data and a causal head; returned states and a tail |
| gradient-sign | gradient_sign.py | the gradient of the logits (HT training) |
| label-enumeration | label_enumeration.py | the gradient of hidden states (HBT training), a tail |
| bli | label_reconstruction.py | the same |
| label-least-squares | label_least_squares.py | shared updates, a tail |
| norm-scoring | norm_scoring.py | a gradient |
| direction-scoring | direction.py | a gradient, one known label |
| spectral | spectral.py | a gradient, or forward states |
| label-completion | label_completion.py | forward states, known labels of two classes |
| zero-rows | zero_rows.py | a gradient |
| dlg, tag, lamp | gradient_matching.py | the gradient of hidden states (HBT training), a tail |
| dlg-updates, tag-updates, lamp-updates | update_matching.py, update_search.py | shared updates, a head and in HBT a tail |
| dager | dager.py | shared updates, a causal head |
| membership-residual | membership.py | shared updates, a head, candidate texts |
| feature-space-hijacking | feature_space_hijacking.py | a model party that cheats in training; public text |
| attribute-probe | attributes.py | smashed data, a head, labelled texts |
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
        "linear-inverter": "vflair_attacks.linear_inverter:LinearInverter",
        "bisr": "vflair_attacks.bisr:BiSR",
        "wbi": "vflair_attacks.wbi:WhiteBoxInversion",
        "coordinate-search": "vflair_attacks.coordinate_search:CoordinateSearch",
        "replacement-inversion": "vflair_attacks.replaced_words:ReplacementInversion",
        "beam-clean": "vflair_attacks.beam_clean:BeamClean",
        "model-completion": "vflair_attacks.model_completion:ModelCompletion",
        "joint-inversion": "vflair_attacks.model_completion:JointInversion",
        "gradient-sign": "vflair_attacks.gradient_sign:GradientSign",
        "label-enumeration": "vflair_attacks.label_enumeration:LabelEnumeration",
        "bli": "vflair_attacks.label_reconstruction:BatchLabelReconstruction",
        "label-least-squares": "vflair_attacks.label_least_squares:LabelLeastSquares",
        "norm-scoring": "vflair_attacks.norm_scoring:NormScoring",
        "direction-scoring": "vflair_attacks.direction:DirectionScoring",
        "spectral": "vflair_attacks.spectral:Spectral",
        "label-completion": "vflair_attacks.label_completion:LabelCompletion",
        "zero-rows": "vflair_attacks.zero_rows:ZeroRows",
        "dlg": "vflair_attacks.gradient_matching:DeepLeakage",
        "tag": "vflair_attacks.gradient_matching:Tag",
        "lamp": "vflair_attacks.gradient_matching:Lamp",
        "dlg-updates": "vflair_attacks.update_matching:DeepLeakageOfUpdates",
        "tag-updates": "vflair_attacks.update_matching:TagOfUpdates",
        "lamp-updates": "vflair_attacks.update_matching:LampOfUpdates",
        "dager": "vflair_attacks.dager:Dager",
        "membership-residual": "vflair_attacks.membership:MembershipResidual",
        "feature-space-hijacking": "vflair_attacks.feature_space_hijacking:FeatureSpaceHijacking",
        "attribute-probe": "vflair_attacks.attributes:AttributeProbe",
    }
