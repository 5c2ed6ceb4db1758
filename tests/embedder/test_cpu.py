import pytest

from embedder import cpu

INFO = "processor : 0\nflags\t\t: fpu sse2 avx512_vnni {}\n"


@pytest.mark.parametrize(
    ("flags", "bfloat16"), [("amx_bf16 x", True), ("avx512_bf16", True), ("not_amx_bf16", False)]
)
def test_multiplies__what_the_flags_say(flags, bfloat16, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(INFO.format(flags))
    monkeypatch.setattr(cpu, "_CPU_INFO", file)
    assert cpu.multiplies.__wrapped__("bfloat16") is bfloat16
    assert cpu.multiplies.__wrapped__("int8")


def test_multiplies__nothing_where_no_system_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "none")
    assert not cpu.multiplies.__wrapped__("int8")
