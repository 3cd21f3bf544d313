"""Where published data sets lie on disk, and which of their references are used."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from refalign_jax.config.checks import check_range, check_values, expand_home


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenS2VConfig:
    """OpenS2V-5M: its videos and pairs, and the choice of references; the defaults are RefAlign's."""

    videos: str
    """Folder or URL of the videos, as files or in tars, which may be split."""
    pairs: str = ""
    """Cross-clip pairs: a JSON file, a tar, or a folder of JSON files named after their cluster; empty for none."""
    clusters: str = ""
    """`cluster_videos.json`, which says which clips are a cluster; empty to take it from their names."""
    min_aesthetic: float = 4.5
    """Aesthetic score from which a reference is used, whatever its GME score."""
    min_gme: float = 0.6
    """GME score from which a reference is used, whatever its aesthetic score."""
    min_area: float = 0.1
    """Area of the rectangle around a reference, as a fraction of the frame, from which it is used."""
    max_overlap: float = 0.8
    """Overlap of two masks, as a fraction of the smaller, from which the smaller rectangle's is dropped."""
    cross_probability: float = 0.23
    """Probability that a clip which has pairs takes its references from another clip."""
    min_text_similarity: float = 0.6
    """Similarity of the names of a pair from which it is used."""
    min_image_similarity: float = 0.6
    """Similarity of the images of a pair above which it is used."""

    def __post_init__(self) -> None:
        check_values(self)
        expand_home(self, "videos", "pairs", "clusters")
        check_range(self, "min_area", "max_overlap", "cross_probability", least=0, most=1)
        if not self.videos:
            raise ValueError("OpenS2VConfig.videos is empty; name the folder, tar or URL of the videos.")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which references a record has, as JSON."""
        return _settings(self, "videos", "pairs", "clusters") | {"cross_clip": bool(self.pairs)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """Phantom-Data: where the clips and their metadata are."""

    videos: str
    """Folder or URL of the clips, as files or in tars."""
    metadata: str
    """The parquet file with `vid`, `width` and `height`."""
    pattern: str = "{vid}.mp4"
    """Name of a clip's file in `videos`; {vid} stands for <uuid>_<start>_<end>, {uuid}, {start} and {end} for parts."""
    max_overlap: float = 0.8
    """Overlap of two boxes in one frame, as a fraction of the smaller, from which the later one is dropped."""

    def __post_init__(self) -> None:
        check_values(self)
        expand_home(self, "videos", "metadata")
        check_range(self, "max_overlap", least=0, most=1)
        try:
            names = {self.pattern.format(vid=n, uuid=n, start=n, end=n) for n in "ab"}
        except (LookupError, ValueError) as error:
            raise ValueError(f"PhantomConfig.pattern={self.pattern!r} is not a name with {{vid}}: {error}.") from error
        if len(names) < 2:
            raise ValueError(
                f"PhantomConfig.pattern={self.pattern!r} must hold {{vid}}, or {{uuid}}, {{start}}, {{end}}."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which references a record has, as JSON."""
        return _settings(self, "videos", "metadata", "pattern")


def _settings(config: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a configuration as JSON, without those that say where something is."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    return json.loads(json.dumps(fields))
