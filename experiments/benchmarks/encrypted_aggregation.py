"""What do hidden sums cost? Bytes, CPU seconds and errors on a network of 8 M parameters, beside the usual CKKS.

    OMP_NUM_THREADS=1 python experiments/benchmarks/encrypted_aggregation.py

DenseNet-121, four clients with one random update each. The usual setting of the field is ring degree 8192 with
primes of 60, 40 and 40 bits, scale 2^40 and a public key, and ciphertexts of its own for every tensor; only its first
client's encryption is measured. CPU seconds of one core, one client, one run: the machine is shared, and only ratios
within one run mean something. The error is that of the mean against its value in double precision; `exact` compares
secure aggregation with the sum of the encoded integers, with a quarter of the clients dropped out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedsec.defenses.homomorphic.packing import count_blocks
from fedsec.defenses.homomorphic.parameters import Parameters
from fedsec.defenses.homomorphic.scheme import Scheme
from fedsec.defenses.homomorphic.workers import timed

from fedsec import models, plugins
from fedsec.federation.hidden import HiddenSum
from fedsec.plugins import PluginSpec
from fedsec.types import FederationPlan, Layout, LocalRecipe, RoundContext, Update

CLIENTS = 4
USUAL = Parameters("tenseal", 8192, (60, 40, 40), 40, symmetric=False)
CTX = RoundContext(0, 1, 1)
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "he tenseal": ("he", {"workers": 1}),
    "he seal": ("he", {"backend": "seal", "workers": 1}),
    "he seal, keyholder": ("he", {"backend": "seal", "topology": "keyholder", "workers": 1}),
    "secagg 24 bits": ("secagg", {}),
    "secagg 32 bits": ("secagg", {"bits": 32}),
}


def network() -> Layout:
    """DenseNet-121's trainable tensors."""
    model = models.build("densenet121", num_classes=1000, in_channels=3, image_size=64, norm="group", seed=0)
    return Layout.of(dict(model.named_parameters()))


def updates(layout: Layout) -> list[torch.Tensor]:
    """(d,) each: random, as large as an update after some local steps."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(layout.size, generator=generator) * 0.01 for _ in range(CLIENTS)]


def usual(layout: Layout, delta: torch.Tensor) -> dict[str, Any]:
    """Encryption of every tensor on its own, in the usual setting."""
    encryptor = Scheme(USUAL).encryptor(Scheme(USUAL).generate().client)
    size, seconds, count = 0, {"encrypt": 0.0, "serialise": 0.0}, 0
    for part in layout.views(delta).values():
        flat = part.double().numpy().ravel()
        blocks = [flat[i : i + USUAL.slots] for i in range(0, flat.size, USUAL.slots)]
        bodies, spent = timed(encryptor, blocks)
        size, count = size + sum(map(len, bodies)), count + len(bodies)
        seconds = {stage: seconds[stage] + spent[stage] for stage in seconds}
    return {"expansion": size / (4 * layout.size), "ciphertexts": count, **seconds}


def measure(name: str, params: dict[str, Any], layout: Layout, deltas: list[torch.Tensor]) -> dict[str, Any]:
    """One round; under secagg the last client drops out."""
    recipe = LocalRecipe("multiclass", 1000, 0.01, 0.9, 0.0, 32, 1, None)
    plan = FederationPlan(recipe, 1, (100, 80, 60, 40), layout=layout)
    rule = plugins.build("defenses", PluginSpec(name, params)).calibrate(plan).aggregator()
    assert isinstance(rule, HiddenSum)
    payloads = [rule.encode(Update(k, d, 1), CTX.for_client(k)) for k, d in enumerate(deltas)]
    sent = payloads[: CLIENTS - 1] if name == "secagg" else payloads
    start = time.process_time()
    rule.begin({}, CTX)
    for payload in sent:
        rule.accumulate(payload, CTX)
    result = rule.finish(CTX)
    server = time.process_time() - start
    assert result.delta is not None, result.flags
    weights = [rule.weight(p.client) for p in sent]
    exact = sum(w * deltas[p.client].double() for w, p in zip(weights, sent, strict=True)) / sum(weights)
    row: dict[str, Any] = {"expansion": payloads[0].num_bytes / (4 * layout.size), **payloads[0].stages}
    row |= {stage: spent / len(sent) for stage, spent in rule.seconds.items() if stage.startswith("server")}
    row |= {"opening": sum(rule.seconds.get(stage, 0.0) for stage in ("decrypt", "unmask")), "round": server}
    # What reaches the model is float32; the rule's own error is below its rounding, and measured before it.
    row |= rule.measured_error()
    row["max_error_in_model"] = float((result.delta.double() - exact).abs().max())
    if name == "he":
        row["ciphertexts"] = count_blocks(layout.size, rule.parameters.slots)  # type: ignore[attr-defined]
    else:
        row["exact"] = integers_agree(rule, deltas, weights, result.delta)
    return row


def integers_agree(rule: Any, deltas: list[torch.Tensor], weights: list[float], delta: torch.Tensor) -> bool:
    """Is the opened sum the sum of the encoded integers, bit by bit?"""
    scale = rule.code.scale
    total = sum(np.rint(w * d.double().numpy() * scale).astype(np.int64) for w, d in zip(weights, deltas, strict=False))
    marks = sum(np.rint(w * rule.code.wide_scale) for w in weights) / rule.code.wide_scale
    return bool(np.array_equal((total / scale / marks).astype(np.float32), delta.numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layout = network()
    deltas = updates(layout)
    rows = {"usual, per tensor": usual(layout, deltas[0])}
    print(f"{layout.size:,} parameters in {len(layout.names)} tensors")
    show("usual, per tensor", rows["usual, per tensor"], rows["usual, per tensor"])
    for label in options.only:
        rows[label] = measure(*CONTENDERS[label], layout, deltas)
        show(label, rows[label], rows["usual, per tensor"])
    if options.json:
        Path(options.json).write_text(json.dumps({"parameters": layout.size, "rows": rows}, indent=1), encoding="utf-8")


def show(label: str, row: dict[str, Any], usual_row: dict[str, Any]) -> None:
    client = sum(row.get(stage, 0.0) for stage in ("encrypt", "serialise", "mask"))
    ratio = (usual_row["encrypt"] + usual_row["serialise"]) / client
    words = [f"{label:20} upload {row['expansion']:.3f} x fp32", f"client {client:.2f} s ({ratio:.1f} x cheaper)"]
    words += [
        f"{k} {row[k]:.2f} s" for k in ("encrypt", "serialise", "server_load", "server_add", "opening") if k in row
    ]
    words += [f"{k} {row[k]:.1e}" for k in ("rms_error", "max_error", "max_error_in_model") if k in row]
    words += [f"{k} {row[k]}" for k in ("ciphertexts", "exact") if k in row]
    print(", ".join(words), flush=True)


if __name__ == "__main__":
    main()
