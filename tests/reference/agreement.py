"""Overlap of neighbours and linear CKA as loops over clips, in float64. Shares no code with hear_distill/agreement.py.

n clips   D width
"""

import numpy as np


def nearest(rows: np.ndarray, i: int, num_neighbours: int) -> set[int]:
    """[n, D] -> the clips of largest cosine to clip i, itself left out."""
    others = [j for j in range(len(rows)) if j != i]
    lengths = [float(np.sqrt(np.sum(row**2))) for row in rows]
    others.sort(key=lambda j: -float(np.sum(rows[i] * rows[j])) / (lengths[i] * lengths[j]))
    return set(others[:num_neighbours])


def knn_overlap(student: np.ndarray, teacher: np.ndarray, num_neighbours: int) -> float:
    shared = [
        len(nearest(student, i, num_neighbours) & nearest(teacher, i, num_neighbours)) for i in range(len(student))
    ]
    return sum(shared) / (num_neighbours * len(student))


def linear_cka(student: np.ndarray, teacher: np.ndarray) -> float:
    """By the kernels of clips, [n, n], and not by the features: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    n = len(student)
    kernels = []
    for rows in (student, teacher):
        kernel = np.array([[float(np.sum(a * b)) for b in rows] for a in rows])
        centred = np.empty_like(kernel)
        for i in range(n):
            for j in range(n):
                centred[i, j] = kernel[i, j] - kernel[i].mean() - kernel[:, j].mean() + kernel.mean()
        kernels.append(centred)
    hsic = [[sum(a[i, j] * b[i, j] for i in range(n) for j in range(n)) for b in kernels] for a in kernels]
    return hsic[0][1] / (hsic[0][0] * hsic[1][1]) ** 0.5
