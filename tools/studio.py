r"""Serves a page on which pictures and a prompt become a video, on this machine alone unless --host says otherwise.

    python tools/studio.py                         the demo's model, after `make demo`
    python tools/studio.py --weights refalign/ --vae Wan2.1/ --text-encoder Wan2.1/

The page needs the package gradio: pip install -e '.[studio]'. It shows pictures as the model will see them, progress,
previews and the video. Options set what the page begins with, and what it has no field for.
"""

from refalign_jax.command import run

# isort: split
import dataclasses
import ipaddress
import signal
import socket
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, arg

from refalign_jax.config import DemoConfig, GenerateConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is drawn with, and where the page is."""

    weights: Annotated[str, arg(metavar="PLACE", help_behavior_hint="(default: the run of the demo)")] = ""
    """A run's folder, a checkpoint, published weights, or a hub id, as tools/sample.py takes them."""
    out: Path = Path("runs/studio")
    """Folder of the videos; each start makes a folder of its own in it."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every network of this machine: then who reaches it can use the page."""
    port: int = 7860
    """Port to listen on; 0 for a free one."""
    config: OmitArgPrefixes[GenerateConfig] = dataclasses.field(default_factory=GenerateConfig)


def studio(arguments: Arguments) -> None:
    """Opens the networks and serves the page.

    Raises:
      ValueError: there are no weights, an option has no use on a page, Gradio is missing, or the port is in use.
    """
    weights, config = arguments.weights or _demo(), arguments.config
    for name in ("noise", "embeddings", "save"):
        if getattr(config, name):
            raise ValueError(f"--{name} belongs to tools/sample.py; the page has no use for it.")
    if config.part != (1, 1):
        raise ValueError("--part belongs to tools/sample.py; the page makes one video at a time.")
    port = _free_port(arguments.host, arguments.port)
    try:
        from refalign_jax.studio.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("The page needs the package gradio: pip install -e '.[studio]'.") from error
    from refalign_jax.studio.jobs import Studio

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as by Ctrl-C, and leaves nothing half written
    serve(Studio(weights, config, arguments.out), arguments.host, port, Path(weights) / "samples")


def _demo() -> str:
    """The folder of the demo's run."""
    folder = DemoConfig().folder / "seed-0"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"No --weights are named, and {folder} holds no run of the demo; name weights, or run `make demo` first."
        )
    return str(folder)


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
      ValueError: the host is no address of this machine, or the port is in use.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, port))
            return found.getsockname()[1]
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The page can't listen on --host {host} --port {port} ({reason}); --port 0 takes a free port."
        ) from error


def main(arguments: list[str], prog: str) -> None:
    """Parses and serves."""
    studio(tyro.cli(Arguments, args=arguments, prog=prog, description=__doc__))


if __name__ == "__main__":
    run(main)
