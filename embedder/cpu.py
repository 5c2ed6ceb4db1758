"""What this CPU multiplies in hardware, as Linux tells it; nothing is known elsewhere."""

from functools import cache
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8"},
}


@cache
def multiplies(kind: str) -> bool:
    """Whether there are instructions for products of `bfloat16` or `int8`."""
    try:
        return not _FLAGS[kind].isdisjoint(_CPU_INFO.read_text(encoding="utf-8").split())
    except OSError:
        return False
