"""What an attack concluded, beside the truth, beside what was possible, and beside what a naive attacker obtains."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsec.federation.assemble import Federation
from fedsec.federation.training import Training
from fedsec.federation.victims import Victim
from fedsec.findings import Findings, Limits, PublicData, Reconstruction
from fedsec.metrics.encoder import PublicEncoder, train_encoder
from fedsec.metrics.features import Embed
from fedsec.metrics.limits import adaptive_gap, beside_limits
from fedsec.metrics.reconstruction import summarise_reconstructions
from fedsec.metrics.reidentification import identifies
from fedsec.types import RoundContext

GALLERY = 500
"""Largest number of same-class candidates that re-identification has to tell apart."""
STAMP = ("labels", "victim_batch", "victim_mode", "view")
"""Assumptions without which no measure of a reconstruction may be read."""
NAIVE_KEYS = ("psnr", "psnr_of_mean_mse", "ssim", "reid_rank1")


@dataclass(frozen=True)
class Judge:
    """Everything that reconstructions of one cell are compared with."""

    federation: Federation
    training: Training
    victims: Sequence[Victim]
    public: PublicData
    gallery: tuple[Tensor, Tensor]
    encoder: PublicEncoder | None

    @classmethod
    def of(cls, federation: Federation, training: Training, victims: Sequence[Victim], public: PublicData) -> Judge:
        """With a gallery of strangers, and an encoder where the public images suffice for one."""
        seed = RoundContext(federation.cell.seed, 0, 0).entropy("public-encoder")
        encoder = train_encoder(public.images, public.labels, seed)
        return cls(federation, training, victims, public, gallery_of(federation, victims), encoder)

    def leakage(self, findings: Findings, limits: Sequence[Limits]) -> dict[str, Any]:
        """The leakage table: each observed round on its own; the headline is the worst of them."""
        if not findings.reconstructions:
            return {}
        by_round = {number: self._round(number, findings, limits) for number in sorted({v.round for v in self.victims})}
        worst = max(by_round, key=lambda r: by_round[r]["psnr"].value)
        return {**by_round[worst], "round": worst, "by_round": by_round}

    def _round(self, number: int, findings: Findings, limits: Sequence[Limits]) -> dict[str, Any]:
        chosen = [i for i, v in enumerate(self.victims) if v.round == number]
        own = [findings.reconstructions[i] for i in chosen]
        table = self._compare(number, chosen, own, self._victim_features(number), self.encoder)
        draw = RoundContext(self.federation.cell.seed, number, 0).numpy("limits-bootstrap")
        allowed = [limits[i] for i in chosen] if limits else []
        table |= beside_limits(table["images"], allowed, generator=draw, identified=identifies(table))
        if findings.naive:
            naive = self._compare(number, chosen, [findings.naive[i] for i in chosen], None, None)
            table["adaptive_gap"] = adaptive_gap(table["images"], naive["images"], generator=draw)
            table["naive"] = {key: naive[key] for key in NAIVE_KEYS if key in naive}
        return table | how_recovered(own)

    def _compare(
        self,
        number: int,
        chosen: Sequence[int],
        items: Sequence[Reconstruction],
        features: Embed | None,
        encoder: PublicEncoder | None,
    ) -> dict[str, Any]:
        return summarise_reconstructions(
            items,
            [self.victims[i].images for i in chosen],
            [self.victims[i].labels for i in chosen],
            public_images=self.public.images,
            gallery_images=self.gallery[0],
            gallery_labels=self.gallery[1],
            generator=RoundContext(self.federation.cell.seed, number, 0).numpy("leakage-bootstrap"),
            victim_features=features,
            encoder=encoder,
        )

    def _victim_features(self, number: int) -> Embed | None:
        """Penultimate features of the model that was broadcast in this round."""
        model = self.federation.build_model(self.training.snapshots[number]).to(self.federation.device).eval()
        embed = getattr(model, "embed", None)
        if embed is None:
            return None
        return lambda images: torch.cat([embed(part.to(self.federation.device)) for part in images.split(256)])


def how_recovered(items: Sequence[Reconstruction]) -> dict[str, Any]:
    """What the attack itself says of its reconstructions, without any truth."""
    own = [item.est_psnr for item in items if item.est_psnr is not None]
    return {
        "certified": sum(item.certified for item in items),
        "methods": dict(Counter(item.method for item in items)),
        "not_applicable": {method: why for item in items for method, why in item.not_applicable.items()},
        "attack_notes": sorted({note for item in items for note in item.notes}),
        "attack_cpu_seconds": round(sum(item.seconds for item in items), 3),
        **({"est_psnr": statistics.median(own)} if own else {}),
    }


def stamped(name: str, findings: Findings) -> Findings:
    """The findings themselves; refused where reconstructions come without the assumptions they rest on."""
    missing = [key for key in STAMP if key not in findings.assumptions]
    if findings.reconstructions and missing:
        raise ValueError(
            f"{name}: its findings do not state {', '.join(missing)}; a reconstruction without its assumptions cannot "
            "be measured, add them to Findings.assumptions"
        )
    return findings


def public_prior(public: PublicData, victims: Sequence[Victim]) -> Mapping[str, Any]:
    """What the adversary's public images are: their number, and how many are of the attacked images' classes."""
    described: dict[str, Any] = {"name": public.name, "size": len(public.images), "hash_disjoint": True}
    attacked = torch.cat([v.labels for v in victims])
    if attacked.ndim == 1 and len(public.labels):
        described["same_class_share"] = float(torch.isin(public.labels, attacked.unique()).float().mean())
    return described


def model_state(training: Training, rounds: Sequence[int]) -> Mapping[str, Any]:
    """How far the attacked models were trained: round -> rounds behind it, and validation AUC where there are any."""
    curve = {int(entry["round"]): entry.get("validation_auc") for entry in training.history}
    return {
        str(number): {"rounds_trained": number - 1, **({"validation_auc": curve[number - 1]} if number > 1 else {})}
        for number in rounds
    }


def gallery_of(federation: Federation, victims: Sequence[Victim]) -> tuple[Tensor, Tensor]:
    """Images that re-identification must tell the victims from: none of a victim's patient."""
    dataset = federation.dataset
    taken = np.concatenate([v.rows for v in victims])
    usable = np.isin(dataset.split, ["train", "test"])
    for column in ("patient", "lesion"):
        if column in dataset.meta:
            usable &= ~np.isin(dataset.meta[column], dataset.meta[column][taken])
    usable[taken] = False
    rows = np.flatnonzero(usable)
    rng = RoundContext(federation.cell.seed, 0, 0).numpy("gallery")
    labels = np.asarray(dataset.labels)
    if labels.ndim == 1:  # a sample of each class, so that every victim has enough candidates of its own
        parts = [rows[labels[rows] == c] for c in np.unique(labels[rows])]
        rows = np.concatenate([rng.choice(p, min(len(p), GALLERY), replace=False) for p in parts])
    else:
        rows = rng.choice(rows, min(len(rows), 4 * GALLERY), replace=False)
    return dataset.batch(np.sort(rows))
