"""llama.cpp's own HTTP server in another process, as the package xllamacpp brings it."""

from __future__ import annotations

import atexit
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[4])
params.n_parallel, params.n_ctx = int(sys.argv[2]), int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = params.use_jinja = False
params.swa_full = sys.argv[7] == "1"
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + sys.argv[5])
if sys.argv[5] == "F32":  # flash attention rounds to float16
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if sys.argv[6]:
    params.api_keys = [sys.argv[6]]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaServer:
    """A server of one GGUF file.

    Attributes:
        url: its address.
    """

    def __init__(
        self,
        file: Path,
        slots: int = 1,
        context: int = 1024,
        *,
        port: int = 0,
        cache: str = "F16",
        key: str = "",
        whole_windows: bool = True,
    ) -> None:
        """Start it, and wait until it answers. `context` is each slot's; `whole_windows` is --swa-full."""
        arguments = [str(file), str(slots), str(slots * context), str(port), cache, key]
        arguments.append(str(int(whole_windows)))
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        atexit.register(self.stop)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            self.stop()
            raise RuntimeError(f"llama.cpp's server did not start: {self.log[-2000:]}")

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def stop(self) -> None:
        """Kill it. A second call does nothing."""
        atexit.unregister(self.stop)  # the process may live longer than this object
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def llama_server(file: Path, slots: int = 1, context: int = 1024, **more: object) -> Iterator[LlamaServer]:
    server = LlamaServer(file, slots, context, **more)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.stop()
