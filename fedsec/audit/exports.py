"""What continuous integration reads of an audit: JUnit XML, SARIF 2.1.0, and a block for a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

RULES = {
    "auc": ("FSA001", "Members of the training set are recognised"),
    "advantage": ("FSA001", "Members of the training set are recognised"),
    "tpr_at_1pct_fpr": ("FSA002", "Some members are recognised almost without false alarms"),
    "tpr_at_01pct_fpr": ("FSA002", "Some members are recognised almost without false alarms"),
    "epsilon": ("FSA003", "The claimed epsilon is contradicted"),
    "source_lift": ("FSA004", "The hospital of a training image is told"),
    "inversion_log10p": ("FSA005", "Training images are recovered from the model"),
    "comparison": ("FSA008", "The comparison of members and non-members is not valid"),
}
LEVELS = {"failed": "error", "undecided": "warning", "passed": "note", "invalid": "error", "warning": "warning"}
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def junit(report: Mapping[str, Any]) -> str:
    """One test case for each threshold and each validity check; an undecided threshold is skipped with its reason."""
    cases = [("threshold", g["key"], g["result"], g["text"]) for g in report["thresholds"]]
    cases += [("validity", f"{c['id']} {c['name']}", c["status"], c["message"]) for c in report["validity"]]
    claim = report.get("dp_audit")
    if claim:
        status = "failed" if claim["verdict"] == "contradicted" else "passed"
        cases.append(("claim", "claimed epsilon", status, claim["sentence"]))
    failed = [case for case in cases if case[2] in ("failed", "invalid")]
    skipped = [case for case in cases if case[2] == "undecided"]
    suite = ElementTree.Element(
        "testsuite",
        name="fedsec.audit",
        tests=str(len(cases)),
        failures=str(len(failed)),
        errors="0",
        skipped=str(len(skipped)),
    )
    for kind, name, status, text in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=f"fedsec.audit.{kind}", name=name)
        if status in ("failed", "invalid"):
            ElementTree.SubElement(case, "failure", message=text).text = text
        elif status == "undecided":
            ElementTree.SubElement(case, "skipped", message=text)
        elif status == "warning":
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def sarif(report: Mapping[str, Any]) -> str:
    """SARIF 2.1.0: a result for each threshold, for a contradicted claim and for an invalid comparison."""
    found = [(g["key"], LEVELS[g["result"]], g["text"]) for g in report["thresholds"]]
    found += [("comparison", LEVELS[c["status"]], c["message"]) for c in report["validity"] if c["status"] == "invalid"]
    claim = report.get("dp_audit")
    if claim:
        level = {"contradicted": "error", "investigate": "warning"}.get(claim["verdict"], "note")
        found.append(("epsilon", level, claim["sentence"]))
    model = report["model"]
    rules = {RULES[key][0]: RULES[key][1] for key, _, _ in found}
    results = [
        {
            "ruleId": RULES[key][0],
            "level": level,
            "message": {"text": text},
            "locations": [
                {"physicalLocation": {"artifactLocation": {"uri": model["path"]}, "region": {"startLine": 1}}}
            ],
            "partialFingerprints": {
                "fedsecAudit/v1": hashlib.sha256(f"{RULES[key][0]}/{key}/{model['sha256']}".encode()).hexdigest()
            },
            "properties": {"key": key},
        }
        for key, level, text in found
    ]
    driver = {
        "name": "fedsec",
        "version": report["tool_version"],
        "rules": [{"id": rule, "shortDescription": {"text": text}} for rule, text in sorted(rules.items())],
    }
    content = {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(content, indent=1) + "\n"


def model_card(report: Mapping[str, Any]) -> str:
    """A Markdown block of at most 20 lines."""
    model, data, head = report["model"], report["data"], report.get("membership", {}).get("headline")
    lines = [
        "## Privacy audit",
        "",
        f"- {report['created'][:10]}, fedsec {report['tool_version']}, model sha256 `{model['sha256'][:16]}`",
        f"- data: {data['name']}, {data['n_members']:,} members, {data['n_nonmembers']:,} non-members",
    ]
    if head:
        for key in ("auc", "tpr_at_1pct_fpr"):
            value = head[key]
            if "value" in value:
                interval = f"[{value['low']:.4f}, {value['high']:.4f}]"
                lines.append(f"- membership, {head['method']}, {key}: {value['value']:.4f} {interval}")
            else:
                lines.append(f"- membership, {head['method']}, {key}: not resolvable, {value['not_resolvable']}")
    claim = report.get("dp_audit")
    if claim:
        said = "none" if claim["claimed"] is None else f"{claim['claimed']:g}"
        proved = f"{claim['proven']:.2f}"
        lines.append(f"- epsilon per {claim['unit']}, δ = {claim['delta']:g}: claimed {said}, proven at least {proved}")
    lines += [f"- {text}" for text in report["risk_sentences"][:6]]
    lines.append(f"- limits: {report['not_shown'][0]}")
    return "\n".join(lines[:20]) + "\n"
