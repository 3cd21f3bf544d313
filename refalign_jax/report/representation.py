"""What tokens tell about their subjects: numbers and maps, in numpy and scikit-learn.

Tokens are compared by the cosine between them after their common mean is taken away, since alignment works on
directions and a transformer's tokens share a large offset.
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

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) with both centred: 1 for a rotation and scaling of the same, NaN where one is constant.
    """
    x, y = _centred(x), _centred(y)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.square(np.linalg.norm(y.T @ x)) / norms) if norms > 0 else float("nan")


def silhouette(x: Float[np.ndarray, "n D"], subjects: Int[np.ndarray, " n"]) -> float:
    """Mean silhouette of the tokens by subject, cosine distance, in [-1, 1]; NaN with fewer than two subjects."""
    if not 1 < len(np.unique(subjects)) < len(subjects):
        return float("nan")
    return float(silhouette_score(_directions(x), subjects, metric="cosine"))


def neighbour_accuracy(
    x: Float[np.ndarray, "n D"], subjects: Int[np.ndarray, " n"], allowed: Bool[np.ndarray, "n n"]
) -> float:
    """Share of tokens whose nearest allowed token is one of the same subject.

    Args:
      x: the tokens.
      subjects: whose they are.
      allowed: which token may be the neighbour of which; see `allowed_neighbours`.

    Returns:
      In [0, 1], over the tokens that have an allowed neighbour of their own subject; NaN where none has.
    """
    same = allowed & (subjects[:, None] == subjects)
    counted = same.any(1)
    if not counted.any():
        return float("nan")
    directions = _directions(x)
    nearest = np.where(allowed, directions @ directions.T, -np.inf).argmax(1)
    return float(np.mean((subjects[nearest] == subjects)[counted]))


def chance(subjects: Int[np.ndarray, " n"], allowed: Bool[np.ndarray, "n n"]) -> float:
    """What `neighbour_accuracy` is on average when neighbours are drawn at random."""
    same = (allowed & (subjects[:, None] == subjects)).sum(1)
    counted = same > 0
    return float(np.mean(same[counted] / allowed.sum(1)[counted])) if counted.any() else float("nan")


def same_pixels(patches: Float[np.ndarray, "n V"], tolerance: float = 0.05) -> Bool[np.ndarray, "n n"]:
    """Which tokens show the same pixels: latents that differ by less than `tolerance` of what two do on average."""
    x = _centred(patches)
    squares = np.square(x).sum(1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    return distances <= np.square(tolerance) * max(2 * squares.mean(), 1e-12)


def background(same: Bool[np.ndarray, "n n"], owners: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Tokens that show what a token of another owner shows too, such as white padding: they show nobody.

    Args:
      same: which tokens show the same pixels.
      owners: subject of each; where subjects have no names, its place in the picture.
    """
    return (same & (owners[:, None] != owners)).any(1)


def allowed_neighbours(
    same: Bool[np.ndarray, "n n"], examples: Int[np.ndarray, " n"], places: Int[np.ndarray, " n"] | None = None
) -> Bool[np.ndarray, "n n"]:
    """Which token may be whose neighbour: one out of another example, that does not show the same pixels.

    Tokens of one example have seen each other through attention, and the same patch of the same picture is near itself
    under any transformer: counting either would make the accuracy 1 before anything is learned.

    Args:
      same: which tokens show the same pixels.
      examples: the example of each.
      places: of each in its picture, where tokens at the same place are to be left out too: references are framed
        alike, so that their borders look alike at the same place whoever is in them.
    """
    allowed = ~same & (examples[:, None] != examples)
    return allowed if places is None else allowed & (places[:, None] != places)


def principal_map(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n 2"]:
    """The first two principal components of the tokens' directions."""
    return PCA(2, random_state=0).fit_transform(_directions(x))


def tsne_map(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n 2"]:
    """t-SNE by cosine distance, begun at the principal components, the same every time."""
    perplexity = min(30.0, (len(x) - 1) / 3)
    principal = principal_map(x)
    start = (principal / max(principal[:, 0].std(), 1e-12) * 1e-4).astype(np.float32)
    tsne = TSNE(2, perplexity=perplexity, init=start, metric="cosine", random_state=0)
    with threadpool_limits(1):  # its loops are short: threads that share their cores with others took 13 times as long
        return tsne.fit_transform(_directions(x))


def _centred(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) - x.mean(0, dtype=np.float64)


def _directions(x: np.ndarray) -> np.ndarray:
    """Tokens without their mean, at length 1."""
    return normalize(_centred(x)).astype(np.float32)
