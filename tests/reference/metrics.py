"""Average precision by its definition, one threshold after another. Shares no code with hear_distill/probes.py."""

from collections.abc import Sequence


def average_precision(is_positive: Sequence[bool], scores: Sequence[float]) -> float:
    """Sum over the distinct scores, from the highest, of (recall here - recall before) x precision here."""
    num_positives = sum(bool(positive) for positive in is_positive)
    total, recall_before = 0.0, 0.0
    for threshold in sorted({float(score) for score in scores}, reverse=True):
        retrieved = [positive for positive, score in zip(is_positive, scores, strict=True) if score >= threshold]
        hits = sum(bool(positive) for positive in retrieved)
        recall, precision = hits / num_positives, hits / len(retrieved)
        total += (recall - recall_before) * precision
        recall_before = recall
    return total
