from __future__ import annotations

import json
from pathlib import Path

from fedsec.data.medmnist_table import MEDMNIST, SETS, SIZES, file_name

TASKS = {"multi-class": "multiclass", "binary-class": "binary", "ordinal-regression": "ordinal"}


def test_table_equals_the_published_one(shared_data: Path) -> None:
    published = json.loads((shared_data / "metadata" / "medmnist_v3_info_2d.json").read_text())
    assert set(published) == set(MEDMNIST)
    for name, facts in published.items():
        info = MEDMNIST[name]
        keys = {size: "MD5" if size == 28 else f"MD5_{size}" for size in SIZES}
        assert dict(info.md5) == {size: facts[key] for size, key in keys.items()}
        # The published table writes `granulocytes(` without a blank.
        assert [c.replace(" ", "") for c in info.class_names] == [c.replace(" ", "") for c in facts["label"].values()]
        assert info.channels == facts["n_channels"]
        assert info.task == TASKS.get(facts["task"], "multilabel")
        assert info.licence == facts["license"]
        for size in SIZES:
            url = facts["url" if size == 28 else f"url_{size}"]
            assert file_name(name, size) in url


def test_traps() -> None:
    assert SETS["breastmnist"].positive_class == 0
    assert SETS["pneumoniamnist"].positive_class == 1
    assert SETS["retinamnist"].task == "ordinal"
    assert [name for name, info in MEDMNIST.items() if not info.commercial] == ["dermamnist"]
