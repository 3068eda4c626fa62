"""Index maps against torch's own convolution, and solves against a known input."""

from __future__ import annotations

import pytest
import torch
from fedsec.attacks.gradinversion.candidate import NotApplicable
from fedsec.attacks.gradinversion.conv_solve import (
    Geometry,
    constraints,
    forward_matrix,
    gradient_matrix,
    solve_input,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

geometries = st.tuples(
    st.integers(1, 3),  # input channels
    st.integers(1, 4),  # output channels
    st.sampled_from([1, 2, 3, 5]),  # kernel
    st.integers(1, 3),  # stride
    st.integers(0, 2),  # padding
    st.integers(1, 2),  # dilation
    st.integers(9, 12),  # height
    st.integers(9, 12),  # width
)


def build(spec: tuple[int, ...]) -> tuple[Geometry, torch.Tensor, torch.Tensor, torch.Tensor]:
    channels, outputs, kernel, stride, padding, dilation, height, width = spec
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, channels, height, width, generator=generator, dtype=torch.float64)
    w = torch.randn(outputs, channels, kernel, kernel, generator=generator, dtype=torch.float64).requires_grad_(True)
    z = F.conv2d(x, w, None, stride, padding, dilation)
    pairs = ((n, n) for n in (kernel, stride, padding, dilation))
    geometry = Geometry((channels, height, width), tuple(z.shape[1:]), *pairs)
    return geometry, x, w, z


@settings(deadline=None, max_examples=40)
@given(geometries)
def test_matrices_are_those_of_torch(spec: tuple[int, ...]) -> None:
    geometry, x, w, z = build(spec)
    flat, weight = x.flatten(2)[0], w.detach().flatten(2)
    product = forward_matrix(weight, geometry).T @ flat.reshape(-1)
    assert torch.allclose(product, z.detach().reshape(-1), atol=1e-12)
    one = forward_matrix(weight, geometry, 0).T @ flat[0]
    alone = F.conv2d(x[:, :1], w[:, :1].detach(), None, geometry.stride, geometry.padding, geometry.dilation)
    assert torch.allclose(one, alone.reshape(-1), atol=1e-12)
    delta = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (dw,) = torch.autograd.grad((z * delta).sum(), w)
    rows = gradient_matrix(delta[0].flatten(1), geometry) @ flat.T  # (O·k², I)
    assert torch.allclose(rows, dw.flatten(2).transpose(1, 2).reshape(-1, spec[0]), atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(4, 8), st.sampled_from([3, 5]), st.integers(1, 2), st.integers(0, 2))
def test_solve_recovers_the_input(channels: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
    geometry, x, w, z = build((channels, outputs, kernel, stride, padding, 1, 12, 10))
    delta = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (dw,) = torch.autograd.grad((z * delta).sum(), w, retain_graph=True)
    rows = [forward_matrix(w.detach().flatten(2), geometry).T]
    rows.append(torch.block_diag(*[gradient_matrix(delta[0].flatten(1), geometry)] * channels))
    stacked = torch.cat(rows)
    counted, unknowns = constraints(geometry, z.numel())
    if counted < unknowns:
        assert int(torch.linalg.matrix_rank(stacked)) < unknowns
        return
    singular = torch.linalg.svdvals(stacked)
    assume(float(singular[-1]) > 1e-3 * float(singular[0]))
    flat = delta[0].flatten(1)
    found = solve_input(
        w.detach().flatten(2), dw.flatten(2), flat, z.detach()[0].flatten(1), torch.ones_like(flat), geometry
    )
    assert float((found - x.flatten(2)[0]).abs().max()) < 1e-4


def test_woodbury_and_normal_equations_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weighted least-squares problem, factored through n + O·n' or through I·n unknowns."""
    from fedsec.attacks.gradinversion import conv_solve

    geometry, x, w, z = build((6, 6, 5, 2, 2, 1, 12, 12))
    assert z.numel() < x.numel()
    delta = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (dw,) = torch.autograd.grad((z * delta).sum(), w)
    flat = delta[0].flatten(1)
    noisy = dw.flatten(2) + 1e-3 * torch.randn(dw.flatten(2).shape, generator=torch.Generator().manual_seed(2))
    arguments = (w.detach().flatten(2), noisy, flat, z.detach()[0].flatten(1), torch.full_like(flat, 0.5), geometry)
    small = solve_input(*arguments)
    monkeypatch.setattr(conv_solve, "_woodbury", conv_solve._normal)
    large = solve_input(*arguments)
    assert torch.allclose(small, large, atol=1e-7)


def test_a_system_that_would_not_fit_is_refused() -> None:
    geometry = Geometry((3, 224, 224), (64, 112, 112), (7, 7), (2, 2), (3, 3), (1, 1))
    z = torch.zeros(64, 112 * 112, dtype=torch.float64)
    w = torch.ones(64, 3, 49, dtype=torch.float64)
    with pytest.raises(NotApplicable, match="unknowns is above the limit"):
        solve_input(w, w, z, z, z, geometry)
