"""Are figures written as SVG, PNG and CSV, complete, without overlaps, and blurred when asked?"""

from __future__ import annotations

import csv
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsec.plotting import COLOURS, blurred, reconstruction_wall, spread, training_curve


def images(n, channels=1, pixels=16, seed=0):
    return torch.rand(n, channels, pixels, pixels, generator=torch.Generator().manual_seed(seed))


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("channels", [1, 3])
def test_wall_writes_three_files_and_the_psnr_of_each_image(tmp_path, channels):
    truth = 0.5 * images(3, channels)
    broken = truth + 0.1
    broken[1] = float("nan")
    files = reconstruction_wall(
        [("original", truth), ("none: recovered", broken), ("public mean", truth[:1])], tmp_path / "dp-eps8.0"
    )
    assert [f.name for f in files] == ["dp-eps8.0.svg", "dp-eps8.0.png", "dp-eps8.0.csv"]
    table = rows_of(files[2])
    assert len(table) == 9
    assert [float(r["psnr_db"]) for r in table if r["row"] == "none: recovered"] == pytest.approx(
        [20.0, float("nan"), 20.0], abs=1e-3, nan_ok=True
    )
    assert float(table[6]["psnr_db"]) == 140
    with Image.open(files[1]) as picture:
        assert 600 < picture.width < 1300
        assert np.asarray(picture.convert("L")).std() > 20
    assert files[0].read_text().lstrip().startswith("<?xml")


def test_wall_shows_eight_columns_and_says_what_it_left_out(tmp_path):
    truth = images(11)
    files = reconstruction_wall([("original", truth), ("public mean", truth[:1])], tmp_path / "wall")
    assert len(rows_of(files[2])) == 16
    assert "first 8 of 11 images" in files[0].read_text()  # matplotlib keeps each text as a comment


def test_redacted_wall_holds_none_of_the_pixels(tmp_path):
    truth = images(2)
    plain, hidden = (
        reconstruction_wall([("original", truth), ("none", truth)], tmp_path / str(r), redact=r) for r in (False, True)
    )
    assert rows_of(plain[2]) == rows_of(hidden[2])
    assert "blurred on purpose" in hidden[0].read_text()
    with Image.open(plain[1]) as a, Image.open(hidden[1]) as b:
        assert a.size == b.size
        strip = np.s_[20:200, 330:500]
        roughness = [np.abs(np.diff(np.asarray(p.convert("L"), dtype=float)[strip])).mean() for p in (a, b)]
    assert roughness[1] < roughness[0] / 4


def test_blurring_keeps_sixteen_numbers_an_image():
    image = images(1, 3, 32)[0]
    within = image.clone()
    within[:, :8, :8] = within[:, :8, :8].flip(1, 2)
    assert torch.allclose(blurred(image), blurred(within), atol=1e-6)
    assert blurred(image).shape == image.shape


def test_wall_refuses_rows_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="row 'b' has 3 images beside 2"):
        reconstruction_wall([("a", images(2)), ("b", images(3))], tmp_path / "x")
    with pytest.raises(ValueError, match="row 'a' has shape"):
        reconstruction_wall([("a", images(2, channels=2))], tmp_path / "x")
    with pytest.raises(ValueError, match="at least one row"):
        reconstruction_wall([], tmp_path / "x")


def test_curves_are_written_with_every_value(tmp_path):
    curves = {"none": [(1, 0.5), (2, 0.8)], "dp ε=8": [(1, 0.5), (2, float("nan"))], "broken": [(1, float("nan"))]}
    files = training_curve(curves, tmp_path / "new" / "auc.svg")
    assert [f.name for f in files] == ["auc.svg", "auc.png", "auc.csv"]
    table = rows_of(files[2])
    assert [(r["curve"], r["round"], r["test AUC"]) for r in table] == [
        ("none", "1", "0.500000"),
        ("none", "2", "0.800000"),
        ("dp ε=8", "1", "0.500000"),
        ("dp ε=8", "2", "nan"),
        ("broken", "1", "nan"),
    ]
    drawing = files[0].read_text()
    assert "no value: broken" in drawing
    assert COLOURS[0].lower() in drawing and COLOURS[1].lower() in drawing


def test_the_same_results_give_the_same_drawing(tmp_path):
    one, two = (training_curve({"a": [(1, 0.5), (2, 0.6)]}, tmp_path / name)[0].read_bytes() for name in "ab")
    assert one == two


def test_no_curve_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no curve has a value"):
        training_curve({"a": []}, tmp_path / "x")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.05, 0.1])), min_size=1, max_size=15))
@example([(0.0, 0.05)] * 5 + [(0.0, 0.1)] * 5 + [(1.0, 0.05)] * 3 + [(1.0, 0.1)])  # fills the axis to the last bit
def test_labels_never_overlap_and_stay_where_there_is_room(ends):
    ends.sort()
    places, sizes = zip(*ends, strict=True)
    moved = spread(places, sizes)
    gaps = [(b - a) - (s + t) / 2 for (a, b), (s, t) in zip(pairwise(moved), pairwise(sizes), strict=True)]
    assert min(gaps, default=0) >= -1e-9
    excess = max(0.0, sum(sizes) - 1)
    assert moved[0] >= sizes[0] / 2 - excess - 1e-9 and moved[-1] <= 1 - sizes[-1] / 2 + excess + 1e-9
    assert moved[-1] - moved[0] + (sizes[0] + sizes[-1]) / 2 <= 1 + excess + 1e-9
    apart = all(b - a >= (s + t) / 2 for (a, b), (s, t) in zip(pairwise(places), pairwise(sizes), strict=True))
    if apart and sizes[0] / 2 <= places[0] and places[-1] <= 1 - sizes[-1] / 2:
        assert moved == pytest.approx(list(places))


def test_importing_and_drawing_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys, fedsec.plotting as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"p.training_curve({{'a': [(1, .5)]}}, {str(tmp_path / 'c')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_of_several_shares_the_largest_alone_has_figures_of_its_own():
    from fedsec.figures import lesser_shares

    shares = [f"poisoning:method=alie,fraction={f}" for f in (0.1, 0.3, 0.2)]
    others = ["poisoning:method=ipm,fraction=0.1", "gradinversion:images=4"]
    assert lesser_shares([*shares, *others]) == {shares[0], shares[2]}


def test_pictures_are_paired_as_they_are_scored(tmp_path):
    """A sum of three gives three images for the one that the victim sent; a batch comes back in another order."""
    from fedsec import checkpoint
    from fedsec.figures import paired

    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.full((1, 8, 8), 0.5)
    tensors = {
        "public_mean": mean,
        "000/round-2/original": images[:1],
        "000/round-2/recovered": images[[3, 4, 0]],
        "001/round-2/original": images[1:3],
        "001/round-2/recovered": images[[2, 1]] + 0.01,
        "002/round-2/original": images[5:],
        "002/round-2/recovered": images[:0],
        "003/round-1/original": images[:1],
        "003/round-1/recovered": images[:1],
    }
    checkpoint.save(tmp_path / "r.safetensors", {k: t.clone() for k, t in tensors.items()}, {})
    originals, recovered, kept = paired(tmp_path / "r.safetensors", 2)
    assert torch.equal(originals, images[[0, 1, 2, 5]]) and torch.equal(kept, mean)
    torch.testing.assert_close(recovered, torch.stack([images[0], images[1] + 0.01, images[2] + 0.01, mean]))
