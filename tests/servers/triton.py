"""The real `tritonserver`, from the environment that `make triton-env` makes."""

import itertools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.servers.process import LOOPBACK, ServerProcess, entered, find_environment

SHARED_MEMORY = Path("/dev/shm")
_number = itertools.count()


def triton_environment() -> Path:
    """Return Triton's environment; skip the test without, or fail it where servers are required."""
    return find_environment(".venv-triton", "ZTUNE_TRITON_ENV", "triton-env")


class TritonServer(ServerProcess):
    """Triton with every model of a repository; started, and ready, when the constructor returns."""

    def __init__(
        self, repository: Path, *, args: Sequence[str] = (), wait_s: float = 180.0
    ) -> None:
        self.environment = triton_environment()
        self.repository = repository.absolute()
        self.args = tuple(args)
        super().__init__(wait_s=wait_s)
        self.region = f"ztune-{os.getpid()}-{next(_number)}-"
        asked = (
            "import sysconfig as s; print(s.get_path('purelib')); print(s.get_config_var('LIBDIR'))"
        )
        python = self.environment / "bin" / "python"
        said = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True)
        packages, library = said.stdout.split("\n")[:2]
        self._packages, self._library = Path(packages), library
        self.start()

    def _command(self) -> list[str]:
        home = self._packages / "pytriton" / "tritonserver"
        return [
            str(home / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={self.environment / 'backends'}",
            f"--cache-directory={home / 'caches'}",
            f"--grpc-address={LOOPBACK}",
            f"--grpc-port={self._grpc_port}",
            f"--http-address={LOOPBACK}",
            f"--http-port={self._http_port}",
            "--http-thread-count=2",
            "--model-load-thread-count=1",
            "--allow-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--exit-timeout-secs=5",
            # Two servers must not share a region, and what a killed one leaves must be found.
            f"--backend-config=python,shm-region-prefix-name={self.region}",
            *self.args,
        ]

    def _environment(self) -> dict[str, str]:
        # The backend's stub embeds Python: the first `python3` on the path tells it which packages.
        return entered(self.environment) | {
            "LD_LIBRARY_PATH": f"{self._packages / 'nvidia_pytriton.libs'}:{self._library}",
        }

    def _clean(self) -> None:
        for left in SHARED_MEMORY.glob(f"*{self.region}*"):
            left.unlink(missing_ok=True)
