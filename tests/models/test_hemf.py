"""HEMF: counts of the specification, its attentions against loops, gradients where they belong, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedsec import models
from fedsec.errors import ConfigError
from fedsec.models.hemf import HEMF, TINY_WIDTHS, WIDTHS
from fedsec.models.hemf_fusion import SIRMLP, ExternalAttention, Fusion
from fedsec.models.hemf_pyramid import EGF, ELF, DecayedAttention, Pyramid, attend, decay, rotated


def on_paper(classes: int, channels: int = 3, prune: bool = False) -> HEMF:
    """The large model without memory for its weights."""
    with torch.device("meta"):
        return HEMF("hemf", classes, channels, 224, "batch", WIDTHS, 4, 3, prune)


def tiny(classes: int = 2, channels: int = 1, **options: object) -> nn.Module:
    return models.build("hemf_tiny", num_classes=classes, in_channels=channels, image_size=64, **options)


def count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize(
    ("classes", "channels", "expected"),
    [(7, 3, 68_269_367), (8, 3, 68_270_136), (2, 3, 68_265_522), (2, 1, 68_259_378)],
)
def test_parameter_counts(classes: int, channels: int, expected: int) -> None:
    assert count(on_paper(classes, channels)) == expected


@pytest.mark.parametrize(
    ("classes", "channels", "expected"), [(2, 1, 1_048_578), (2, 3, 1_049_602), (7, 3, 1_050_247), (7, 1, 1_049_223)]
)
def test_parameter_counts_of_the_tiny_model(classes: int, channels: int, expected: int) -> None:
    assert count(tiny(classes, channels)) == expected


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_parts_have_the_counts_of_their_formulas(norm: str) -> None:
    for d, elf, egf, hef, mlp in zip(
        WIDTHS,
        (93_504, 371_328, 1_479_936, 5_908_992),
        (147_552, 571_584, 2_249_088, 8_921_856),
        (263_044, 1_037_380, 4_120_516, 16_424_644),
        (184_992, 738_624, 2_951_808, 11_801_856),
        strict=True,
    ):
        with torch.device("meta"):
            parts = ELF(d), EGF(d, 3), Fusion(d, False, norm, False), SIRMLP(d, norm)
        assert [count(part) for part in parts] == [elf, egf, hef, mlp]
    with torch.device("meta"):
        assert count(Pyramid(3, WIDTHS, [nn.Identity()] * 4)) == 1_555_872


def test_parameters_that_no_image_reaches_are_declared_and_can_be_left_out() -> None:
    """Figures of the specification, section 4.5."""
    full, pruned = on_paper(7), on_paper(7, prune=True)
    assert count(full, trained=True) == count(pruned) == 66_678_263
    assert count(full) - count(pruned) == 1_591_104
    assert pruned.unused_parameters() == ()
    assert count(tiny(2, 3), trained=True) == count(tiny(2, 3, prune_unused=True)) == 1_003_938
    model = tiny()
    model(torch.rand(2, 1, 64, 64)).sum().backward()
    without = {name for name, p in model.net.named_parameters() if p.grad is None}
    assert without == set(model.net.unused_parameters())
    assert without


def test_pruned_and_full_models_compute_the_same() -> None:
    full, pruned = tiny(seed=1), tiny(seed=2, prune_unused=True)
    pruned.load_state_dict({k: v for k, v in full.state_dict().items() if k in pruned.state_dict()})
    x = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(full(x), pruned(x), rtol=0, atol=0)


def test_batch_norm_layers_number_32_and_group_norm_replaces_them() -> None:
    assert sum(isinstance(m, nn.BatchNorm2d) for m in on_paper(2).modules()) == 32
    assert sum(isinstance(m, nn.GroupNorm) for m in tiny(norm="group").modules()) == 32
    tiny(norm="group").train()(torch.rand(1, 1, 64, 64))


@pytest.mark.parametrize("side", [64, 96])
def test_embed_then_head_equals_forward(side: int) -> None:
    model = models.build("hemf_tiny", num_classes=5, in_channels=3, image_size=side).eval()
    x = torch.rand(2, 3, side, side)
    assert model.embed(x).shape == (2, TINY_WIDTHS[-1])
    torch.testing.assert_close(model.head(model.embed(x)), model(x), rtol=0, atol=0)
    assert [len(f) for f in (model.net.local(x), model.net.other(x))] == [4, 4]
    assert [f.shape[-1] for f in model.net.local(x)] == [side // 4, side // 8, side // 16, side // 32]


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 224])
def test_the_large_model_runs(side: int) -> None:
    model = models.build("hemf", num_classes=7, in_channels=3, image_size=side).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, side, side)).isfinite().all()


# --- attention ---------------------------------------------------------------------------------------------------


def test_decay_is_a_power_of_the_distance() -> None:
    m = decay(7, torch.zeros((), dtype=torch.float64)).exp()
    for head in range(8):
        gamma = 1 - 2 ** (-1 - 3 * head / 8)
        for i in range(7):
            for j in range(7):
                assert m[head, i, j].item() == pytest.approx(gamma ** abs(i - j), rel=1e-12)


@pytest.mark.parametrize("depth", [2, 4, 12])
def test_rotation_turns_neighbours_by_the_pixel_index(depth: int) -> None:
    x = torch.randn(1, 1, 2, 3, depth, dtype=torch.float64)
    turned = rotated(x)
    for h in range(2):
        for w in range(3):
            for i in range(depth // 2):
                omega = 10000 ** (-i / (depth / 2 - 1)) if depth > 2 else 1.0
                angle = omega * (h * 3 + w)
                a, b = x[0, 0, h, w, 2 * i].item(), x[0, 0, h, w, 2 * i + 1].item()
                got = turned[0, 0, h, w, 2 * i : 2 * i + 2].tolist()
                expected = [
                    a * math.cos(angle) - b * math.sin(angle),
                    b * math.cos(angle) + a * math.sin(angle),
                ]
                assert got == pytest.approx(expected, abs=1e-12)


def test_attention_runs_along_rows_then_columns() -> None:
    """Against loops over single rows, columns and heads."""
    torch.manual_seed(0)
    side, width = 3, 16
    layer = DecayedAttention(width).double()
    x = torch.randn(1, side, side, width, dtype=torch.float64)
    heads = [t(x).view(side, side, 8, 2) for t in (layer.query, layer.key, layer.value)]
    q, k, v = (h.permute(2, 0, 1, 3) for h in heads)
    q, k = rotated(q[None])[0], rotated(k[None] * 2**-0.5)[0]

    def one(q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
        gamma = 1 - 2 ** (-1 - 3 * head / 8)
        rows = []
        for i in range(side):
            scores = torch.stack([q[i] @ k[j] + abs(i - j) * math.log(gamma) for j in range(side)])
            rows.append((scores.softmax(0)[:, None] * v).sum(0))
        return torch.stack(rows)

    out = torch.empty_like(v)
    for head in range(8):
        along_rows = torch.stack([one(q[head, h], k[head, h], v[head, h], head) for h in range(side)])
        for w in range(side):
            out[head, :, w] = one(q[head, :, w], k[head, :, w], along_rows[:, w], head)
    local = layer.local(heads[2].reshape(1, side, side, width).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = layer.out(out.permute(1, 2, 0, 3).reshape(1, side, side, width) + local)
    torch.testing.assert_close(layer(x), expected)
    assert attend(q[None], k[None], v[None], decay(side, v)).shape == (1, 8, side, side, 2)


def test_external_attention_shares_of_the_slots_sum_to_one() -> None:
    torch.manual_seed(0)
    layer = ExternalAttention(32).double()
    nn.init.normal_(layer.key.weight)
    x = torch.randn(2, 32, 3, 3, dtype=torch.float64)
    weights = layer.weights(x)
    assert weights.shape == (2, 8, 9, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8, 9, dtype=torch.float64))
    token = x[1, 4:8, 2, 0]  # head 1, token 6
    tokens = x[1, 4:8].reshape(4, 9).T @ layer.key.weight.T
    shares = tokens.softmax(0)[6]
    shares = shares / shares.sum()
    torch.testing.assert_close(layer.weights(x)[1, 1, 6], shares)
    assert token.shape == (4,)
    torch.testing.assert_close(layer(x)[1, 4:8, 2, 0], layer.value.weight @ shares)


def test_released_initialisation() -> None:
    net = tiny().net
    conv, linear = net.local.stages[3][0].conv, net.other.stages[3].feed[0]
    assert conv.weight.std().item() == pytest.approx(0.2, rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert conv.bias.abs().max() == linear.bias.abs().max() == net.fc.bias.abs().max() == 0
    assert net.fusion[3].weigh_local.external.key.weight.std().item() == pytest.approx(1e-3, rel=0.1)
    assert net.fusion[3].mlp.conv.weight.std() < 0.1  # framework's default, not 0.2


@pytest.mark.parametrize(
    ("side", "words"), [(32, "too small, it needs 64"), (72, "a multiple of 32, not 72; use data.size=64")]
)
def test_refusals(side: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        models.build("hemf_tiny", num_classes=2, in_channels=1, image_size=side)
