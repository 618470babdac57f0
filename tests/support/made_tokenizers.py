"""Small tokenizers of each kind, trained here, and chat templates in the manner of known models."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

WORDS = [
    "Who wrote the first program? Ada Lovelace wrote the first program in London.",
    "system user assistant model Be brief. What is 1 + 1? It is 2, said Ada. yes no maybe",
] * 4
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>",
           "<</SYS>>", "<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>", "<start_of_turn>",
           "<end_of_turn>", "<think>", "</think>"]  # fmt: skip


def _metaspace(scheme):
    from tokenizers import decoders, pre_tokenizers

    return (
        pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoders.Metaspace(prepend_scheme=scheme),
    )


def make_tokenizer(kind: str, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Train ``byte-bpe``, ``metaspace-bpe`` (space in front of each text), ``metaspace-first``, ``wordpiece`` or ``unigram``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import trainers as t

    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 420}
    if kind == "byte-bpe":
        made, trainer = (
            Tokenizer(models.BPE()),
            t.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options),
        )
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif kind in ("metaspace-bpe", "metaspace-first"):
        made, trainer = Tokenizer(models.BPE(unk_token="<unk>")), t.BpeTrainer(**options)
        scheme = "always" if kind == "metaspace-bpe" else "first"
        made.pre_tokenizer, made.decoder = _metaspace(scheme)
    elif kind == "wordpiece":
        made, trainer = (
            Tokenizer(models.WordPiece(unk_token="<unk>")),
            t.WordPieceTrainer(**options),
        )
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(),
        )
    else:
        made = Tokenizer(models.Unigram())
        trainer = t.UnigramTrainer(unk_token="<unk>", **{**options, "vocab_size": 120})
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer, made.decoder = _metaspace("always")
    made.train_from_iterator(WORDS, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


# Each marks by generation tags what the assistant says, as transformers' own masks want it.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (s if loop.index0 == 0 else '') + m['content'].strip() + "
        "' [/INST]' }}{% else %}{% generation %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ '<|begin|>' }}{% for m in messages %}<|start_header|>{{ m['role'] }}<|end_header|>\n\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot|>{% endgeneration %}{% else %}"
        "{{ m['content'] | trim }}<|eot|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% set r = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "<start_of_turn>{{ r }}\n{% if r == 'model' %}{% generation %}{{ m['content'] | trim }}<end_of_turn>"
        "{% endgeneration %}{% else %}{{ m['content'] | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}  # fmt: skip
