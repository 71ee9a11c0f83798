"""Floors: what a candidate must keep, and by how much one falls short."""

from expunge.calibrate.reading import Reading
from expunge.calibrate.section import Floors


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
