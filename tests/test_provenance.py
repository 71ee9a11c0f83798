"""What is told of a machine beside what was measured on it."""

from pathlib import Path

import torch

from expunge import provenance

CPUINFO = """processor\t: 0
model\t\t: 207
cpu family\t: 6
model name\t: Some: CPU @ 2 GHz

processor\t: 1
model\t\t: 1
"""


def test_a_processor_is_told_by_its_name_family_and_model(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: CPUINFO)
    assert provenance.processor() == "Some: CPU @ 2 GHz (cpu family 6 model 207)"
    assert provenance.machine().endswith(f"threads, torch {torch.__version__}")
    assert provenance.machine().startswith("Some: CPU @ 2 GHz (cpu family 6 model 207), ")


def test_without_linuxs_list_the_platform_tells(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert provenance.processor() != ""
    said = provenance.provenance()
    assert said["processor"] == provenance.processor()
    assert (said["peak_device_bytes"] is None) == (not torch.cuda.is_initialized())
