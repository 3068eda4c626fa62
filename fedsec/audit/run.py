"""`fedsec audit`: open the model, check the comparison, ask the attacks, judge, compare with thresholds, report."""

from __future__ import annotations

import datetime
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedsec import __version__, plugins
from fedsec.attack import Attack
from fedsec.audit import exports, gates, page
from fedsec.audit.exam import Exam
from fedsec.audit.gates import Side
from fedsec.audit.inversion import public_mean
from fedsec.audit.membership import leaks
from fedsec.audit.page import Picture
from fedsec.audit.subjects import Said, Subject, of_file, of_run
from fedsec.errors import ConfigError, RefusedError
from fedsec.files import write_json, write_text
from fedsec.findings import Findings, MembershipScores
from fedsec.machine import prepare_for_small_networks
from fedsec.metrics.signals import logits_of, signals
from fedsec.plugins import PluginSpec
from fedsec.progress import Progress
from fedsec.types import to_json

SCHEMA = "fedsec.audit/1"
PARTS = ("membership", "source", "inversion", "attributes", "property")
LIMITS = (
    "Lower bounds only: no leak found is not no leak",
    "One model, one training, these images: another training changes the numbers",
    "An average over images is not one patient's risk",
    "Encryption and secure aggregation do not change what the final model gives away",
    "Differences between the two populations are tested for, and can never be excluded",
    "Nothing here replaces a legal assessment",
)


@dataclass(frozen=True)
class Wanted:
    """What an audit is asked for, beside its subject."""

    attacks: tuple[str, ...] = ()
    """As on the command line; empty: every installed attack that needs the released model alone."""
    shadows: int = 8
    fail_above: Mapping[str, float] = field(default_factory=dict)
    fail_on: Side = "lower"
    strict: bool = False
    allow_shift: bool = False
    budget: float | None = None
    """Seconds of wall time; fewer shadows, then fewer attacks, once they run out."""
    redact: bool = False
    report: Path | None = None
    json: Path | None = None
    junit: Path | None = None
    sarif: Path | None = None
    card: Path | None = None


def audit(
    model: str | Path,
    said: Said | None = None,
    wanted: Wanted | None = None,
    *,
    cell: str | None = None,
    data_dir: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audit a run folder or a model file.

    Args:
        model: path. said: what the owner of a bare model file says of it. wanted: attacks, thresholds and outputs.
        cell: which cell of a run folder. cache: where shadows of a bare file are kept.

    Returns:
        the report in JSON form; `exit_code` is 0, or 1 where a threshold was exceeded or a claim is contradicted.

    Raises:
        RefusedError: an unsafe file, or a comparison that would prove nothing.
    """
    said, wanted, progress = said or Said(), wanted or Wanted(), progress or Progress()
    start, path = time.perf_counter(), Path(model)
    attacks = build_attacks(wanted)
    prepare_for_small_networks()
    if path.is_dir():
        subject = of_run(path, cell, data_dir, said, progress)
    else:
        subject = of_file(path, said, data_dir, cache or Path(tempfile.gettempdir()) / "fedsec-audit", progress)
    refuse(subject.exam, wanted.allow_shift)
    deadline = None if wanted.budget is None else time.monotonic() + wanted.budget - (time.perf_counter() - start)
    result, pictures, notes = ask(replace(subject.exam, deadline=deadline), attacks, progress)
    if subject.dp:
        result["dp_audit"] = subject.dp
    thresholds = gates.gate(result, wanted.fail_above, wanted.fail_on)
    failed = any(g.result == "failed" or (wanted.strict and g.result == "undecided") for g in thresholds)
    refuted = subject.dp.get("verdict") == "contradicted"
    works = model_works(subject.exam)
    report: dict[str, Any] = to_json(
        {
            "schema": SCHEMA,
            "tool_version": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["fedsec", *sys.argv[1:]]),
            "seed": said.seed,
            "model": subject.model.describe(),
            "data": _data(subject.exam),
            "validity": [c.to_json() for c in subject.exam.cohort.checks] + [works],
            **result,
            **({"claim": dict(subject.claim)} if subject.claim else {}),
            "thresholds": [g.to_json() for g in thresholds],
            "risk_sentences": sentences(result, subject),
            "not_shown": list(LIMITS),
            "notes": notes,
            "outcome": outcome(result, subject, failed, refuted),
            "exit_code": 1 if failed or refuted else 0,
            "timings": {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time(), 1)},
        }
    )
    write(report, pictures, wanted)
    return report


def build_attacks(wanted: Wanted) -> list[Attack]:
    """The attacks that were named, else all that need the released model alone.

    Raises:
        ConfigError: an unknown one, or one that asks for no candidates.
    """
    words = wanted.attacks or tuple(
        name
        for name in plugins.names("attacks")
        if (known := plugins.load("attacks", name)).seat == "outsider" and not known.on_request
    )
    built = []
    for word in words:
        spec = PluginSpec.parse(word)
        attack_class = plugins.load("attacks", spec.name)
        fields = plugins.parameter_fields(attack_class)
        if "shadows" in fields and "shadows" not in spec.params and not attack_class.on_request:
            spec = PluginSpec(spec.name, {**spec.params, "shadows": wanted.shadows})
        attack: Attack = plugins.build("attacks", spec)
        if attack.candidates() is None:
            raise ConfigError(f"--attack {spec.name}: it attacks a training, not a trained model; use fedsec run")
        built.append(attack)
    return built


def refuse(exam: Exam, allow_shift: bool) -> None:
    """Stop before anything is computed that would look like evidence and be none.

    Raises:
        RefusedError: too few images, or members and non-members of two kinds.
    """
    for check in exam.cohort.checks:
        if check.status == "invalid" and not (allow_shift and check.id == "V6"):
            hint = "; --allow-shift prints the numbers as no evidence" if check.id == "V6" else ""
            raise RefusedError(f"{check.message}{hint}")


@dataclass
class Pictures:
    """Images for the page: they are of patients, or made from a model of patients, and go nowhere else."""

    recovered: list[Picture] = field(default_factory=list)
    exposed: list[Picture] = field(default_factory=list)


def ask(exam: Exam, attacks: Sequence[Attack], progress: Progress) -> tuple[dict[str, Any], Pictures, list[str]]:
    """Every attack's findings, judged; images for the report; and notes."""
    result: dict[str, Any] = {}
    pictures = Pictures()
    notes: list[str] = []
    for attack in attacks:
        plan = attack.candidates()
        assert plan is not None
        if exam.deadline is not None and time.monotonic() > exam.deadline and result:
            notes.append(f"{attack.name}: left out, the budget was spent")
            continue
        progress.stage(attack.name, 1)
        findings = attack.conclude(exam.target(plan)) or Findings()
        judged = exam.judge(findings)
        result |= judged
        notes += findings.notes
        pictures.recovered += recovered(exam, findings)
        if "exposed" in judged.get("membership", {}):
            method = judged["membership"]["headline"]["method"]
            pictures.exposed = exposed(exam, next(m for m in findings.memberships if m.method == method))
        progress.advance(1)
    return result, pictures, notes


def recovered(exam: Exam, findings: Findings) -> list[Picture]:
    """The best attempt at each class, beside the mean of public images."""
    found: list[Picture] = []
    shown: set[int] = set()
    for item in findings.prototypes:
        name = exam.dataset.class_names[item.label]
        found.append((f"{name}: best attempt, {item.method}", _pixels(item.images[0])))
        if item.label not in shown:
            found.append((f"{name}: mean of public images", _pixels(public_mean(exam, item.label)[0])))
            shown.add(item.label)
    return found


def exposed(exam: Exam, item: MembershipScores) -> list[Picture]:
    """The training images that a method recognises best, without anything that names them."""
    places = exam.exposed(item)
    images, _ = exam.dataset.batch(exam.cohort.rows[places])
    names = exam.classes()[places]
    return [
        (f"member {i} of those recognised best" + (f", {name}" if name else ""), _pixels(x))
        for i, (name, x) in enumerate(zip(names, images, strict=True), 1)
    ]


def _pixels(x: Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(x.permute(1, 2, 0).cpu())


def model_works(exam: Exam) -> dict[str, Any]:
    """V7: is the model better than always naming the largest class? Else it, or its preprocessing, is the wrong one."""
    x, y = exam.dataset.batch(exam.cohort.rows)
    found = signals(logits_of(exam.released(), x, exam.device), y.numpy(), exam.dataset.task)
    right, member = found.phi > 0, exam.cohort.member
    inside, outside = float(right[member].mean()), float(right[~member].mean())
    text = f"right on {inside:.1%} of members and {outside:.1%} of non-members"
    labels = y.numpy()
    floor = float(np.unique(labels, return_counts=True)[1].max() / len(labels)) if labels.ndim == 1 else 0.0
    poor = labels.ndim == 1 and inside < floor
    if poor:
        text += f", less than the largest class ({floor:.1%}): wrong preprocessing, or hardly trained"
    return {"id": "V7", "name": "model works", "status": "warning" if poor else "ok", "message": text}


def sentences(result: Mapping[str, Any], subject: Subject) -> list[str]:
    """The plain words that lead the report."""
    parts = [result[p]["verdict"] for p in PARTS if p in result]
    if subject.dp:
        parts.insert(0, subject.dp["sentence"])
    elif subject.claim:
        parts.append(
            f"The training claims ε = {subject.claim['epsilon']:.4g} per {subject.claim['unit']}; without canaries "
            "in the training (fedsec run --canaries) this cannot be tested"
        )
    return parts


def outcome(result: Mapping[str, Any], subject: Subject, failed: bool, refuted: bool) -> dict[str, str]:
    """What stands in the verdict box."""
    if refuted:
        return {"kind": "fail", "title": "Claimed epsilon refuted"}
    if failed:
        return {"kind": "fail", "title": "A threshold is exceeded"}
    if not subject.exam.cohort.valid:
        return {"kind": "invalid", "title": "Not evidence of memorisation: the comparison is not valid"}
    head = result.get("membership", {}).get("headline", {})
    if head and leaks(head):
        return {"kind": "leak", "title": "This model gives away who was in its training data"}
    return {"kind": "pass", "title": "This audit found no evidence of leakage; see what it could have missed"}


def write(report: Mapping[str, Any], pictures: Pictures, wanted: Wanted) -> None:
    """The files that were asked for, each whole or not at all."""
    if wanted.json:
        write_json(wanted.json, report)
    if wanted.report:
        page_text = page.render(report, pictures.recovered, pictures.exposed, wanted.redact)
        write_text(wanted.report, page_text)
    if wanted.junit:
        write_text(wanted.junit, exports.junit(report))
    if wanted.sarif:
        write_text(wanted.sarif, exports.sarif(report))
    if wanted.card:
        write_text(wanted.card, exports.model_card(report))


def _data(exam: Exam) -> dict[str, Any]:
    member = exam.cohort.member
    return {
        "name": exam.dataset.name,
        "sha256": exam.dataset.fingerprint,
        "n_members": int(member.sum()),
        "n_nonmembers": int((~member).sum()),
        "n_population": len(exam.cohort.population),
        "patients": len(np.unique(exam.dataset.groups()[exam.cohort.rows])),
    }
