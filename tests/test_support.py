"""docs/make/support.yaml: what it calls tested has tests, and what it calls refused is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from llmpipe import errors
from llmpipe.front.asked import read_recipe
from llmpipe.stages import STAGES

ROOT = Path(__file__).parent.parent
TABLE = yaml.safe_load((ROOT / "docs" / "make" / "support.yaml").read_text(encoding="utf-8"))
FEATURES = {feature["name"]: feature for feature in TABLE["features"]}
STATUSES = ("tested", "experimental", "refused")
REFUSALS = [
    (name, stage)
    for name, feature in FEATURES.items()
    if "refusals" in feature
    for stage in feature["refused"].split()
]


@pytest.mark.parametrize("name", FEATURES)
def test_a_stage_has_one_status_and_a_reason(name):
    feature = FEATURES[name]
    stages = [stage for status in STATUSES for stage in feature.get(status, "").split()]
    assert stages and set(stages) <= set(STAGES) and len(set(stages)) == len(stages)
    for status in ("experimental", "refused"):
        assert (status in feature) == (f"why_{status}" in feature)


@pytest.mark.parametrize("name", FEATURES)
def test_the_tests_are_there(name):
    feature = FEATURES[name]
    assert "by" in feature or "refusals" in feature
    for place in feature.get("by", ()):
        file, _, function = place.partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M), place


@pytest.mark.parametrize(("name", "stage"), REFUSALS)
def test_what_is_refused(name, stage, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    tiny = Path("recipes", "tiny", f"{stage}.yaml")
    path = tiny if tiny.exists() else Path("recipes", f"{stage}.yaml")
    feature = FEATURES[name]
    sets = [f"{field}={str(value).lower()}" for field, value in feature["with"].items()]
    with pytest.raises(errors.UserError) as refused:
        read_recipe(stage, path, str(tmp_path / "run"), sets)
    assert feature["refusals"] in str(refused.value)
