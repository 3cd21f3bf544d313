"""Two processes on this machine, for the tests of many processes."""

import socket
import subprocess
import sys
import time
from pathlib import Path

from support.places import environment


class Pair:
    """Two Python processes that join each other; their output goes to files."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.outputs = [folder / f"output-{i}.txt" for i in range(2)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            variables = environment(
                JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i),
                XLA_FLAGS="--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
            )
            command = [sys.executable, *arguments]
            with output.open("w") as file:
                self.processes.append(subprocess.Popen(command, env=variables, stdout=file, stderr=file))

    def wait(self, seconds: float = 600) -> list[int]:
        """Returns the exit codes of both; those that take longer are killed."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(until - time.monotonic(), 0)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> str:
        """Returns what both printed."""
        return "\n".join(f"{output.name}:\n{output.read_text()}" for output in self.outputs)
