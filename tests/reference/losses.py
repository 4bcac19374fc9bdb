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


# ------------------------------------------------------------------------- terms against a queue, a value for each clip


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def relational_to_queue(student: np.ndarray, teacher: np.ndarray, queue: np.ndarray) -> list[float]:
    """[B, E], [B, E], [M, E] -> [B]"""
    s, t, q = unit(student), unit(teacher), unit(queue)
    return [sum((dot(a, row) - dot(b, row)) ** 2 for row in q) / len(q) for a, b in zip(s, t, strict=True)]


def contrastive_to_queue(
    student: np.ndarray, teacher: np.ndarray, queue: np.ndarray, temperature: float
) -> tuple[list[float], int]:
    """[B, E], [B, E], [M, E] -> [B], and how many pairs of clip and queue row were left out as the same sound."""
    s, t, q = unit(student), unit(teacher), unit(queue)
    values, num_left_out = [], 0
    for a, b in zip(s, t, strict=True):
        own = math.exp(dot(a, b) / temperature)
        total = own
        for row in q:
            if dot(b, row) > 0.98:
                num_left_out += 1
            else:
                total += math.exp(dot(a, row) / temperature)
        values.append(-math.log(own / total))
    return values, num_left_out


def prototype(student: np.ndarray, teacher: np.ndarray, prototypes: np.ndarray, temperature: float) -> list[float]:
    """[B, E], [B, E], [K, E] -> [B]"""
    values = []
    for a, b in zip(unit(student), unit(teacher), strict=True):
        p_s, p_t = ([math.exp(dot(x, c) / temperature) for c in unit(prototypes)] for x in (a, b))
        p_s, p_t = ([p / sum(shares) for p in shares] for shares in (p_s, p_t))
        values.append(sum(p * math.log(p / r) for p, r in zip(p_t, p_s, strict=True)))
    return values


def patch(predicted: np.ndarray, target: np.ndarray) -> list[float]:
    """[B, N, P], [B, N, P] -> [B]"""
    values = []
    for a, b in zip(predicted, target, strict=True):
        squares = [(float(x) - float(y)) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)]
        values.append(sum(squares) / len(squares))
    return values
