"""How well tokens separate their subjects: measures and maps, in NumPy and scikit-learn.

Tokens are compared by cosine similarity after their common mean is subtracted, because alignment acts on directions and
the tokens of a transformer share a large offset.
"""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from refalign_jax.types import Bool, Float, Int


def linear_cka(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "n E"]) -> float:
    """Linear centred kernel alignment of two views of the same tokens (Kornblith et al. 2019, equation 5).

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) with both centred. It is 1 if one view is a rotated and scaled copy of the
    other, and NaN if one is constant.
    """
    x, y = _centred(x), _centred(y)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.square(np.linalg.norm(y.T @ x)) / norms) if norms > 0 else float("nan")


def silhouette(x: Float[np.ndarray, "n D"], subjects: Int[np.ndarray, " n"]) -> float:
    """Mean silhouette of the tokens by subject, with cosine distance, in [-1, 1]; NaN with fewer than two subjects."""
    if not 1 < len(np.unique(subjects)) < len(subjects):
        return float("nan")
    return float(silhouette_score(_directions(x), subjects, metric="cosine"))


def neighbour_accuracy(
    x: Float[np.ndarray, "n D"], subjects: Int[np.ndarray, " n"], allowed: Bool[np.ndarray, "n n"]
) -> float:
    """Share of tokens whose nearest allowed neighbour belongs to the same subject.

    Args:
      x: the tokens.
      subjects: number of each token's subject.
      allowed: [i, j] is true if token j may be a neighbour of token i; see `allowed_neighbours`.

    Returns:
      A share in [0, 1] of the tokens that have an allowed neighbour of their own subject; NaN if no token has one.
    """
    same = allowed & (subjects[:, None] == subjects)
    counted = same.any(1)
    if not counted.any():
        return float("nan")
    directions = _directions(x)
    nearest = np.where(allowed, directions @ directions.T, -np.inf).argmax(1)
    return float(np.mean((subjects[nearest] == subjects)[counted]))


def chance(subjects: Int[np.ndarray, " n"], allowed: Bool[np.ndarray, "n n"]) -> float:
    """The mean of `neighbour_accuracy` if neighbours were drawn at random."""
    same = (allowed & (subjects[:, None] == subjects)).sum(1)
    counted = same > 0
    return float(np.mean(same[counted] / allowed.sum(1)[counted])) if counted.any() else float("nan")


def same_pixels(patches: Float[np.ndarray, "n V"], tolerance: float = 0.05) -> Bool[np.ndarray, "n n"]:
    """Which tokens show the same pixels.

    Args:
      patches: clean latents of each token.
      tolerance: two tokens show the same pixels if their distance is at most this share of the average distance.
    """
    x = _centred(patches)
    squares = np.square(x).sum(1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    return distances <= np.square(tolerance) * max(2 * squares.mean(), 1e-12)


def background(same: Bool[np.ndarray, "n n"], owners: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which tokens show no subject, such as white padding: those with the same pixels as a token of another owner.

    Args:
      same: which tokens show the same pixels.
      owners: subject of each token or, if subjects have no names, its position in the image.
    """
    return (same & (owners[:, None] != owners)).any(1)


def allowed_neighbours(
    same: Bool[np.ndarray, "n n"], examples: Int[np.ndarray, " n"], places: Int[np.ndarray, " n"] | None = None
) -> Bool[np.ndarray, "n n"]:
    """Which tokens may be neighbours: tokens of different examples that show different pixels.

    Tokens of the same example have attended to each other, and the same patch of the same image is close to itself in
    any transformer. If either counted, the accuracy would be 1 before anything is learned.

    Args:
      same: which tokens show the same pixels.
      examples: number of each token's example.
      places: position of each token in its image. If given, tokens at the same position are not neighbours either:
        references are framed alike, so their borders look alike at the same position whatever the subject.

    Returns:
      [i, j] is true if token j may be a neighbour of token i.
    """
    allowed = ~same & (examples[:, None] != examples)
    return allowed if places is None else allowed & (places[:, None] != places)


def principal_map(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n 2"]:
    """The first two principal components of the tokens' directions."""
    return PCA(2, random_state=0).fit_transform(_directions(x))


def tsne_map(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n 2"]:
    """t-SNE with cosine distance, initialised with the principal components; deterministic."""
    perplexity = min(30.0, (len(x) - 1) / 3)
    principal = principal_map(x)
    start = (principal / max(principal[:, 0].std(), 1e-12) * 1e-4).astype(np.float32)
    tsne = TSNE(2, perplexity=perplexity, init=start, metric="cosine", random_state=0)
    with threadpool_limits(1):  # short loops: threads on busy cores took 13 times as long
        return tsne.fit_transform(_directions(x))


def _centred(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) - x.mean(0, dtype=np.float64)


def _directions(x: np.ndarray) -> np.ndarray:
    """Tokens minus their mean, scaled to unit length."""
    return normalize(_centred(x)).astype(np.float32)
