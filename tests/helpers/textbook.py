"""Algorithms written as the papers state them, to compare with."""

import torch


def textbook_obs(W, H, mask):
    """Optimal Brain Surgeon in a fixed order: each pruned weight is removed alone, those before it held fixed."""
    W = W.clone()
    for row, kept in zip(W, mask):
        for j in range(W.shape[1]):
            if not kept[j]:
                inverse = torch.linalg.inv(H[j:, j:])
                row[j:] -= row[j] / inverse[0, 0] * inverse[:, 0]
    return W * mask
