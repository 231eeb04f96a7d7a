"""Softmax attention in float64 NumPy, over the projections that the efficient attentions share."""

import numpy as np


def softmax(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def split(params, x_LD) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values (H, L, K)."""
    q, k, v = np.einsum("LD,DGHK->GHLK", np.asarray(x_LD, np.float64), np.asarray(params["qkv"], np.float64))
    return q, k, v


def join(params, y_HLK) -> np.ndarray:
    return np.einsum("HLK,HKD->LD", y_HLK, np.asarray(params["out"], np.float64))


def full_attention(params, x_LD) -> np.ndarray:
    q, k, v = split(params, x_LD)
    return join(params, softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])) @ v)


def segment_means(x_HLK: np.ndarray, landmarks: int) -> np.ndarray:
    """Means over segments of adjacent steps, (H, R, K): the shorter ones first."""
    L = x_HLK.shape[1]
    R = min(landmarks, L)
    sizes = [L // R] * (R - L % R) + [L // R + 1] * (L % R)
    stops = np.cumsum(sizes)
    return np.stack([x_HLK[:, stop - size : stop].mean(1) for size, stop in zip(sizes, stops, strict=True)], axis=1)
