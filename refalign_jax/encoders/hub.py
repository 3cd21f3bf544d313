"""Models on Hugging Face's hub, given by their name: OWNER/MODEL.

What the hub's cache holds is used as it is, without asking the hub, so that a run needs no network once the model is
there; see convert/hub.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from refalign_jax.atomic import first_line
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.hub import snapshot

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json"]


def fetch(choice: str) -> Path | None:
    """Finds the folder of a model on the hub, in the cache or by a download.

    Args:
      choice: what the user named: a path that exists, or OWNER/MODEL.

    Returns:
      The folder with config.json and weights; None where the choice is a path, or can't be a name on the hub.

    Raises:
      ValueError: there is no such model, it is gated, it has no safetensors, or the hub can't be reached.
    """
    if Path(choice).exists() or not _NAME.fullmatch(choice):
        return None
    try:
        folder = snapshot(choice, _WANTED, _is_whole)
    except GatedRepoError as error:
        raise ValueError(
            f"--vfm {choice}: the hub gives this model only to those whose request was granted; log in with `hf auth "
            "login`, or take an open one, such as facebook/dinov2-with-registers-large."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"--vfm {choice}: there is no such path, and no such model on the hub.") from error
    except Exception as error:  # the network, in any of its forms
        raise ValueError(
            f"--vfm {choice}: there is no such path, and as a model on the hub it is not in the cache and can't be "
            f"fetched ({first_line(error)}); give the folder of its files."
        ) from error
    if not _is_whole(folder):
        raise ValueError(f"--vfm {choice}: the hub has no config.json with safetensors of it; give another form.")
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache has config.json and all weights."""
    try:
        open_weights(folder)
    except ValueError:  # an interrupted download leaves some of the files
        return False
    return (folder / "config.json").is_file()
