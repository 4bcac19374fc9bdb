"""The published losses as double loops over clips, in float64. Shares no code with hear_distill/losses.py.

B clips   E embedding
"""

import math

import numpy as np


def unit(rows: np.ndarray) -> list[np.ndarray]:
    return [row / math.sqrt(sum(float(value) ** 2 for value in row)) for row in rows]


def mse(student: np.ndarray, teacher: np.ndarray) -> float:
    """[B, E], [B, E]"""
    total = 0.0
    for i in range(len(student)):
        for d in range(student.shape[1]):
            total += (float(student[i, d]) - float(teacher[i, d])) ** 2
    return total / (len(student) * student.shape[1])


def relational(student: np.ndarray, teacher: np.ndarray) -> float:
    """Squared difference of the similarities of two clips, student's against teacher's, over ordered pairs."""
    s, t = unit(student), unit(teacher)
    gaps = [
        (float(np.dot(s[i], s[j])) - float(np.dot(t[i], t[j]))) ** 2
        for i in range(len(s))
        for j in range(len(s))
        if i != j
    ]
    return sum(gaps) / len(gaps)


def one_way(queries: list[np.ndarray], keys: list[np.ndarray], temperature: float) -> float:
    """Mean of -log of the share that each query gives its own key among all keys."""
    total = 0.0
    for i, query in enumerate(queries):
        scores = [math.exp(float(np.dot(query, key)) / temperature) for key in keys]
        total -= math.log(scores[i] / sum(scores))
    return total / len(queries)


def contrastive(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    s, t = unit(student), unit(teacher)
    return (one_way(s, t, temperature) + one_way(t, s, temperature)) / 2


def cosine(student: np.ndarray, teacher: np.ndarray) -> float:
    return sum(float(np.dot(a, b)) for a, b in zip(unit(student), unit(teacher), strict=True)) / len(student)
