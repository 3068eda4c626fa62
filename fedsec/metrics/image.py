"""How close is a reconstruction to the patient's image: measures of pairs of images.

Images are (B, C, H, W) tensors in [0, 1] with data range 1; values outside are clamped. Everything is computed in
float64 on the tensors' own device, and returned per image, never summed or averaged over images.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MSE_FLOOR = 1e-14
"""PSNR is capped at 140 dB, above what float32 images can show."""
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03
RDLV_SMALLEST_PRIOR = 0.05
_BLOCK = 2**24


def replace_missing(images: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Images clamped to [0, 1], with `prior` (C, H, W) in place of each that holds a NaN or Inf; and which, (B,)."""
    missing = ~torch.isfinite(images).flatten(1).all(1)
    repaired = torch.where(missing[:, None, None, None], prior.to(images), images)
    return repaired.clamp(0, 1), missing


def mse(reconstructions: Tensor, truths: Tensor) -> Tensor:
    """Mean squared error of each pair of clamped images, (B,); not floored."""
    _same_shape(reconstructions, truths)
    return (_unit(reconstructions) - _unit(truths)).square().flatten(1).mean(1)


def pairwise_mse(left: Tensor, right: Tensor) -> Tensor:
    """Mean squared error of every clamped image of `left` (A) with every one of `right` (B), (A, B).

    By the binomial formula: absolute error about 1e-15.
    """
    a, size = _unit(left).flatten(1), left[0].numel() if len(left) else 1
    columns = []
    for block in torch.split(right, max(1, _BLOCK // size)):
        b = _unit(block).flatten(1)
        columns.append(a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T)
    return torch.cat(columns, 1).clamp_min(0) / size if columns else a.new_zeros(len(left), 0)


def to_psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors at data range 1, at most 140."""
    return -10 * torch.log10(error.clamp_min(MSE_FLOOR))


def psnr(reconstructions: Tensor, truths: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, (B,); 140 where they are equal.

    Pass reconstructions through `replace_missing` first: a NaN has no PSNR, and leaving it out flatters the attack's
    victims.
    """
    if not torch.isfinite(reconstructions).all():
        raise ValueError("a reconstruction holds NaN or Inf; put the prior in its place with replace_missing")
    return to_psnr(mse(reconstructions, truths))


def ssim(reconstructions: Tensor, truths: Tensor) -> Tensor | None:
    """Structural similarity of each pair, (B,); None where an image is smaller than the window of 11 pixels.

    Wang et al. (2004, equation 13): Gaussian window 11x11, σ = 1.5, K1 = 0.01, K2 = 0.03, population variances, mean
    over the region where the window fits, and over channels.
    """
    _same_shape(reconstructions, truths)
    if min(truths.shape[-2:]) < SSIM_WINDOW:
        return None
    x, y = _unit(reconstructions), _unit(truths)
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        planes = image.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3)).reshape(x.shape[:2]).mean(1)


def rdlv(similarity: Tensor, prior_similarity: Tensor) -> Tensor:
    """Relative data leakage value of each pair (Hatamizadeh et al. 2023): (S(x̂, x) − S(x⁰, x)) / S(x⁰, x).

    S is SSIM and x⁰ what the attacker had before, here the public mean image. 0: no better than the prior;
    (1 − s)/s at perfection, s = S(x⁰, x). Where s < 0.05 the plain difference, because the ratio explodes.
    """
    gain = similarity - prior_similarity
    return torch.where(prior_similarity < RDLV_SMALLEST_PRIOR, gain, gain / prior_similarity)


def largest_rdlv(reconstructions: Tensor, truths: Tensor, prior: Tensor) -> float | None:
    """The largest RDLV of any of A reconstructions with any of B truths; None below 11 pixels.

    A maximum over many pairs is large by chance alone: read it beside the same for images that were not attacked.

    Args:
        reconstructions: (A, C, H, W).
        truths: (B, C, H, W).
        prior: (C, H, W), the public mean image.
    """
    before = ssim(prior.expand_as(truths), truths)
    if before is None:
        return None
    best = -torch.inf
    for image in reconstructions:
        after = ssim(image.expand_as(truths), truths)
        assert after is not None
        best = max(best, float(rdlv(after, before).max()))
    return best


def match(reconstructions: Tensor, truths: Tensor) -> list[int | None]:
    """For each truth the reconstruction assigned to it, by the least total MSE (Kuhn 1955); None where there is none.

    A batch comes back in any order. One assignment serves every measure; the best pair for each truth would count
    one lucky image many times.
    """
    assigned: list[int | None] = [None] * len(truths)
    if len(reconstructions):
        rows, columns = linear_sum_assignment(pairwise_mse(reconstructions, truths).cpu().numpy())
        for row, column in zip(rows, columns, strict=True):
            assigned[column] = int(row)
    return assigned


def nearest_public_psnr(truths: Tensor, public_images: Tensor) -> Tensor:
    """PSNR of the public image nearest to each truth, (B,): what "looks alike" is worth without any attack.

    Chosen with the truth, so an upper limit. Pixel-identical copies of the truth are left out; NaN where nothing
    else is public.
    """
    errors = pairwise_mse(truths, public_images)
    errors[identical(truths, public_images).to(errors.device)] = torch.inf
    nearest = errors.amin(1) if len(public_images) else errors.new_full((len(truths),), torch.inf)
    return torch.where(nearest.isinf(), torch.nan, to_psnr(nearest))


def pixel_hash(images: Tensor) -> list[str]:
    """A digest of each image's shape and 8-bit pixels: equal for equal images, whatever set or run they are from."""
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
    shape = repr(tuple(pixels.shape[1:])).encode()
    return [hashlib.blake2b(shape + image.numpy().tobytes(), digest_size=16).hexdigest() for image in pixels]


def identical(left: Tensor, right: Tensor) -> Tensor:
    """Which images of `left` (A) and `right` (B) have the same 8-bit pixels, (A, B) bool."""
    place = {digest: row for row, digest in enumerate(sorted({*pixel_hash(left), *pixel_hash(right)}))}
    a, b = (torch.tensor([place[digest] for digest in pixel_hash(images)]) for images in (left, right))
    return a[:, None] == b


def _unit(images: Tensor) -> Tensor:
    return images.detach().to(torch.float64).clamp(0, 1)


def _same_shape(reconstructions: Tensor, truths: Tensor) -> None:
    if reconstructions.shape != truths.shape:
        raise ValueError(f"reconstructions of shape {tuple(reconstructions.shape)} for truths {tuple(truths.shape)}")
