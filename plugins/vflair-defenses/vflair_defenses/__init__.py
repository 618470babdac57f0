"""Defenses for split learning of language models: the table of contents.

| name | file | promises |
|---|---|---|
| gaussian-noise | gaussian_noise.py | (ε, δ)-DP per row, and per gradient if asked, composed over all of an example |
| laplace-noise | laplace_noise.py | pure ε-DP, likewise |
| sparsification | sparsification.py | nothing |
| top-k | top_k.py | nothing |
| quantisation | quantisation.py | nothing |
| permutation | permutation.py | nothing: a control that is known to be broken |
| norm-matching | norm_matching.py | nothing |
| marvell | marvell.py | nothing without its Gaussian assumption |
| label-randomised-response | label_randomised_response.py | pure ε-DP per label, once |
| zero-row-padding | zero_row_padding.py | nothing |
| decoy-rows | decoy_rows.py | nothing |
| mid | mid.py | a mean bound of information in nats per token, measured; no DP |
| adversarial-training | adversarial_training.py | nothing |
| nopeek | nopeek.py | nothing |
| text-obfuscator | text_obfuscator.py | nothing |
| dual-guard | dual_guard.py | nothing |
| dual-bottleneck | dual_bottleneck.py | a mean bound of information in nats per token, measured; no DP |
| dx-noise | dx_noise.py | metric DP: η times distance, per token embedding |
| split-and-denoise | split_and_denoise.py | metric DP: η times distance, per row |
| dp-forward | dp_forward.py | (ε, δ)-DP per message of a whole sequence, composed |
| santext | santext.py | metric DP: ε times distance, per word |
| santext-plus | santext.py | nothing: frequent words stay in clear |
| custext | custext.py | ε within a set of words, no bound across sets |
| custext-plus | custext.py | nothing: function words stay in clear |
| rantext | rantext.py | nothing |
"""

from vflair_core import hookimpl

OFFERED = {
    "gaussian-noise": "gaussian_noise:GaussianNoise",
    "laplace-noise": "laplace_noise:LaplaceNoise",
    "sparsification": "sparsification:Sparsification",
    "top-k": "top_k:TopK",
    "quantisation": "quantisation:Quantisation",
    "permutation": "permutation:Permutation",
    "norm-matching": "norm_matching:NormMatching",
    "marvell": "marvell:Marvell",
    "label-randomised-response": "label_randomised_response:LabelRandomisedResponse",
    "zero-row-padding": "zero_row_padding:ZeroRowPadding",
    "decoy-rows": "decoy_rows:DecoyRows",
    "mid": "mid:Mid",
    "adversarial-training": "adversarial_training:AdversarialTraining",
    "nopeek": "nopeek:NoPeek",
    "text-obfuscator": "text_obfuscator:TextObfuscator",
    "dual-guard": "dual_guard:DualGuard",
    "dual-bottleneck": "dual_bottleneck:DualBottleneck",
    "dx-noise": "dx_noise:DxNoise",
    "split-and-denoise": "split_and_denoise:SplitAndDenoise",
    "dp-forward": "dp_forward:DpForward",
    "santext": "santext:SanText",
    "santext-plus": "santext:SanTextPlus",
    "custext": "custext:CusText",
    "custext-plus": "custext:custext_plus",
    "rantext": "rantext:RanText",
}


@hookimpl
def vflair_defenses() -> dict[str, str]:
    """Offer all defenses; each is imported on first use."""
    return {name: f"vflair_defenses.{target}" for name, target in OFFERED.items()}
