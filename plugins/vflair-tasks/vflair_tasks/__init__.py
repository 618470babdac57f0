"""Tasks for split learning of language models: the table of contents, cheap to import."""

from __future__ import annotations

from collections.abc import Mapping

from vflair_core import hookimpl

GLUE = ("cola", "sst2", "stsb", "mrpc", "mnli", "mnli-mismatched", "qnli", "qqp", "wnli", "rte")


@hookimpl
def vflair_tasks() -> Mapping[str, str]:
    """Offer the tasks by name; each is imported on first use."""
    return {
        "python-manual": "vflair_tasks.offline:python_manual",
        "manual-chapters": "vflair_tasks.offline:manual_chapters",
        "planted-records": "vflair_tasks.offline:planted_records",
        "manual-similarity": "vflair_tasks.offline:manual_similarity",
        "record-questions": "vflair_tasks.offline_questions:record_questions",
        "record-answers": "vflair_tasks.offline_questions:record_answers",
        "record-choices": "vflair_tasks.offline_questions:record_choices",
        "record-summaries": "vflair_tasks.offline_questions:record_summaries",
        "record-drawings": "vflair_tasks.offline_questions:record_drawings",
        "own": "vflair_tasks.own:own",
        **{name: f"vflair_tasks.glue:{name.replace('-', '_')}" for name in GLUE},
        "yelp-polarity": "vflair_tasks.reviews:yelp_polarity",
        "yelp-full": "vflair_tasks.reviews:yelp_full",
        "emotion": "vflair_tasks.reviews:emotion",
        "newsgroups": "vflair_tasks.reviews:newsgroups",
        "squad": "vflair_tasks.squad:squad1",
        "squad2": "vflair_tasks.squad:squad2",
        "lambada": "vflair_tasks.lambada:lambada",
        "alpaca": "vflair_tasks.instructions:alpaca",
        "dolly": "vflair_tasks.instructions:dolly",
        "codealpaca": "vflair_tasks.instructions:codealpaca",
        "gsm8k": "vflair_tasks.mathematics:gsm8k",
        "math": "vflair_tasks.mathematics:math",
        "mmlu": "vflair_tasks.mmlu:mmlu",
        "cnn-dailymail": "vflair_tasks.summaries:cnn_dailymail",
        "textvqa": "vflair_tasks.textvqa:textvqa",
    }
