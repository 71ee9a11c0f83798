"""Floors: what a candidate must keep, and by how much one falls short."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expunge.calibrate.reading import Reading
from expunge.calibrate.section import Calibrate, Floors


@dataclass(frozen=True)
class Refusal:
    """Why a finalist that met the floors when screened does not stand."""

    why: str
    """In words."""

    short: Mapping[str, float]
    """What its official scores lack, as `shortfalls` says it."""

    collapsed: bool
    """Whether it writes no language any more, whatever else it keeps."""


def shortfalls(reading: Reading, target: Reading, floors: Floors) -> dict[str, float]:
    """By what is broken, how much is missing, as a share of the floor; nothing where all is met."""
    found = {}
    for term, before in target.terms.items():
        now = reading.terms.get(term)
        if not term.startswith("retain/") or not before or now is None:
            continue
        floor = floors.retain * before
        if now < floor:
            found[term] = 1 - now / floor
    most = floors.neutral * target.neutral
    if reading.neutral > most:
        found["neutral NLL"] = reading.neutral / most - 1
    return found


def said(reading: Reading, target: Reading, floors: Floors) -> str:
    """What is broken, in words: 'retain/Task1/qa 0.62 (floor 0.90), neutral NLL 4.1 (most 3.9)'."""
    parts = []
    for name in shortfalls(reading, target, floors):
        if name == "neutral NLL":
            most = floors.neutral * target.neutral
            parts.append(f"{name} {reading.neutral:.2f} (most {most:.2f})")
        else:
            floor = floors.retain * (target.terms[name] or 0.0)
            parts.append(f"{name} {reading.terms[name]:.2f} (floor {floor:.2f})")
    return ", ".join(parts)


def refusal(
    official: tuple[Reading, Mapping[str, Any]],
    before: tuple[Reading, Mapping[str, Any]],
    config: Calibrate,
) -> Refusal | None:
    """Why a finalist does not stand, by its official scores beside the target's."""
    (now, entry), (target, was) = official, before
    short, reasons = shortfalls(now, target, config.floors), []
    collapsed = entry["collapse"]["collapsed"] and not was["collapse"]["collapsed"]
    if collapsed:
        reasons.append(f"it has collapsed ({'; '.join(entry['collapse']['reasons'])})")
    if short:
        reasons.append(f"generated: {said(now, target, config.floors)}")
    most = config.floors.mmlu
    if most is not None and entry["semeval"]["mmlu"] and was["semeval"]["mmlu"]:
        accuracy = was["semeval"]["mmlu"]["accuracy"]
        lost = accuracy - entry["semeval"]["mmlu"]["accuracy"]
        if lost > most:
            short["MMLU"] = (lost - most) / (accuracy - most)
            reasons.append(f"MMLU fell by {lost:.3f} (most {most:g})")
    return Refusal(", ".join(reasons), short, collapsed) if reasons else None
