"""Where a search keeps its trials: what was screened is counted once, a lost database is told."""

import pytest

from expunge.calibrate.candidate import TARGET, End
from expunge.calibrate.section import Calibrate
from expunge.calibrate.study import open_study, together
from expunge.errors import CalibrationError

OVER, UNDER = [End(branch="deep")], [End(branch=TARGET)]


def test_a_candidate_that_two_processes_read_is_counted_once():
    one = {"read": ["a", "b"], "whole": ["a"], "seconds": 2.0}
    two = {"read": ["b", "c"], "whole": ["b"], "seconds": 1.5}
    assert together([one, two]) == {"candidates": 3, "whole": 2, "seconds": 3.5}


def test_what_was_told_is_found_by_the_next_with_what_it_took(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    spent = {"read": ["a"], "whole": [], "seconds": 1.0}
    first = open_study(url, "name", Calibrate(trials=1))
    trial, line = first.ask(OVER, UNDER)
    first.tell(trial, line, 0.5, bracketed=True, lacks={"floors": 0.0}, spent=spent)
    second = open_study(url, "name", Calibrate(trials=1))
    assert second.found() == [(line, True)]
    own = {"read": ["a", "b"], "whole": ["b"], "seconds": 2.0}
    assert second.spent(own) == {"candidates": 2, "whole": 1, "seconds": 3.0}
    assert first.spent(spent)["seconds"] == 1.0  # its own are not counted twice


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_scale_is_no_dial_of_a_line_to_the_target_where_it_would_say_what_t_says(method):
    config = Calibrate(methods=(method,), scale=(0.7, 1.3))
    trial, line = open_study("sqlite:///:memory:", "name", config).ask(OVER, UNDER)
    assert (line.scale, "scale" in trial.params) == (1.3, False)
    other = [End(branch="shallow")]
    trial, line = open_study("sqlite:///:memory:", "name", config).ask(OVER, other)
    assert line.scale == trial.params["scale"] < 1.3  # control


def test_cmaes_learns_of_the_dials_of_every_line(tmp_path):
    """What only some trials ask for has no place in its distribution, and is drawn at random."""
    config = Calibrate(methods=("linear", "ties"), sampler="cmaes", scale=(0.7, 1.3), trials=8)
    study = open_study(f"sqlite:///{tmp_path}/study.db", "name", config)
    spent, lines = {"read": [], "whole": [], "seconds": 0.0}, []
    for number in range(8):
        trial, line = study.ask(OVER, [End(branch="shallow"), *UNDER])
        assert {"scale", "density"} <= set(trial.params)
        study.tell(trial, line, number, bracketed=True, lacks={"floors": 0.0}, spent=spent)
        lines.append(line)
    searched = study.study.sampler.infer_relative_search_space(study.study, trial)
    assert {"scale", "density"} <= set(searched)
    assert {line.scale for line in lines if line.under.branch == TARGET} == {1.3}
    assert {line.density for line in lines if line.method == "linear"} == {0.8}  # as it is


def test_a_database_that_is_lost_on_the_way_is_told_in_a_line(tmp_path):
    path = tmp_path / "study.db"
    study = open_study(f"sqlite:///{path}", "name", Calibrate())
    trial, line = study.ask(OVER, UNDER)
    path.write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"calibrate\.storage was lost .*sqlite3") as told:
        study.ask(OVER, UNDER)
    assert "\n" not in str(told.value)
    spent = {"read": [], "whole": [], "seconds": 0.0}
    with pytest.raises(CalibrationError, match=r"calibrate\.storage was lost"):
        study.tell(trial, line, 0.5, bracketed=True, lacks={}, spent=spent)
    with pytest.raises(CalibrationError, match=r"calibrate\.storage was lost"):
        study.found()
