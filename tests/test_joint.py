"""What joint tuning gives beside either kind of data alone: the program, and the page that says what it measured."""

import json
import sys
from pathlib import Path

import joint
from tiny_world import language


ROOT = Path(__file__).parents[1]
REPORT = ROOT / "tests" / "results" / "joint.json"


def test_a_part_is_tuned_on_asked_and_not_run_twice(tmp_path, monkeypatch, capsys):
    command = ["joint.py", "--seeds", "0", "--steps", "1", "--count", "2", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    joint.main()
    runs = json.loads((tmp_path / "joint.json").read_text())["runs"]
    assert runs["text only"]["0"]["facts"]["n"] == runs["pictures only"]["0"]["facts"]["n"] == 2
    saved = sorted(tmp_path.glob("*/answers.json"))
    assert len(saved) == 2
    saved[0].write_text(saved[0].read_text().replace('"n": 2', '"n": 77'))
    capsys.readouterr()
    joint.main()
    assert json.loads((tmp_path / "joint.json").read_text())["runs"]["pictures only"]["0"]["facts"]["n"] == 77
    assert capsys.readouterr().out.startswith("|  | joint | pictures only | text only |")


def test_joint_tuning_is_forty_points_above_pictures_only_on_every_language_skill():
    """From the lowest end of any seed's interval to the highest of the other's."""
    runs = json.loads(REPORT.read_text())["runs"]
    for skill in language.SKILLS:
        lowest = min(skills[skill]["low"] for skills in runs["joint"].values())
        highest = max(skills[skill]["high"] for skills in runs["pictures only"].values())
        assert lowest - highest >= 0.40, skill


def test_the_page_says_what_was_measured():
    report, page = json.loads(REPORT.read_text()), (ROOT / "docs" / "tiny_world.md").read_text()
    assert joint.table(report["runs"]) in page
    assert all(report[key] in page for key in ("command", "date", "versions"))
    assert set(report["runs"]["joint"]) == {"0", "1", "2"}
