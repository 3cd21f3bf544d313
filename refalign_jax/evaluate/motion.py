"""Motion amplitude, as OpenS2V-Eval computes it, from dense optical flow between all frames of a video.

    amplitude = |mean over time, pixels and both components of flow_t|,   flow_t = Farneback(gray_t, gray_{t+1})

The mean is of signed values. Two properties of the published script are kept, since scores are compared with its own:
frames are RGB but converted to grey as if they were BGR, and the flow is resized to a width of 16 before the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import UInt8

from refalign_jax.data.decode import decode, open_video
from refalign_jax.data.rgb import to_rgb

FLOW_WIDTH = 16
"""Width to which the flow is resized; its height keeps the aspect."""


def opencv() -> ModuleType:
    """Imports OpenCV, which computes the flow.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError("Motion amplitude needs OpenCV; install it with pip install -e '.[evaluate]'.") from error
    return cv2


def motion_amplitude(path: Path) -> float:
    """Computes `motion_fb` of a video.

    Raises:
      ValueError: OpenCV is missing, or the video can't be decoded or has fewer than two frames.
    """
    cv2 = opencv()
    means, previous = [], None
    for frame in frames(path):
        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        if previous is not None:
            flow = cv2.calcOpticalFlowFarneback(previous, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
            height = max(1, int(flow.shape[0] * FLOW_WIDTH / flow.shape[1]))
            small = cv2.resize(flow, (FLOW_WIDTH, height), interpolation=cv2.INTER_AREA)
            means.append(float(np.mean(small, dtype=np.float64)))
        previous = grey
    if not means:
        raise ValueError(f"{path} has fewer than two frames; motion is between frames.")
    return abs(math.fsum(means) / len(means))


def frames(path: Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields every frame of a video, RGB, as stored: neither turned nor with square pixels."""
    with open_video(path) as (container, stream):
        for frame in decode(path, container, stream):
            yield to_rgb(frame)
