"""The work of a calibration: every line takes all its steps, and as many finalists are judged as
may be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from expunge.calibrate.cross import around
from expunge.calibrate.reading import Material
from expunge.calibrate.section import Calibrate
from expunge.data.batches import TokenSequence
from expunge.pipeline import Pipeline
from expunge.plan.work import Encoded, Reading, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibrating(
    config: Calibrate, pipeline: Pipeline, data: Encoded, tokenizer: PreTrainedTokenizerBase
) -> Reading:
    """What a calibration reads and writes, at most."""
    side = pipeline.chosen_by(config)
    given = pipeline.documents(side, config, tokenizer)
    branches = pipeline.recipe.calibrated_branches(config)
    kept = [name for name in branches if pipeline.recipe.branches[name].keep is not None]
    ends = len(branches) + config.snapshots * len(kept)
    always = 1 + ends + (len(branches) > 1)  # the target, the ends and the paper's merge
    further = ends * (config.scale[1] > 1) + config.trials * config.steps
    read = (always + further) * _documents(given.sample)
    read += (always + config.trials) * _items(given.sample)
    if given.sample != given.calibration:
        read += config.judged * (
            config.steps * _documents(given.calibration) + _items(given.calibration)
        )
    read += (always + config.trials) * (_documents(given.test) + _items(given.test))
    read += len(around(0.5)) * _documents(given.everything)
    judged = [reading("target", pipeline, data, tokenizer, side)]
    judged += config.judged * [reading("calibrated", pipeline, data, tokenizer, side)]
    return Reading(
        read + sum(one.read for one in judged),
        tuple(sorted((n for one in judged for n in one.written), reverse=True)),
        max(one.longest for one in judged),
    )


def _documents(given: Material) -> int:
    return _tokens(sequence for _, sequence in (*given.members, *given.nonmembers))


def _items(given: Material) -> int:
    return _tokens(sequence for _, sequence in given.items) + _tokens(given.neutral)


def _tokens(sequences: Iterable[TokenSequence]) -> int:
    return sum(len(sequence.tokens) for sequence in sequences)
