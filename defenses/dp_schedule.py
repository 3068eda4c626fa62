"""How much noise each client's DP-SGD needs for a budget, from its own number of images or patients."""

from __future__ import annotations

import math
from collections import Counter

from fedsec.errors import ConfigError, RefusedError
from fedsec.privacy.accounting import Gaussian, affordable_steps, calibrate_noise, compose_group, smallest
from fedsec.types import FederationPlan

from .dp_step import Schedule


def patients_of(plan: FederationPlan) -> tuple[tuple[int, ...], ...]:
    """The patient of every image of every client.

    Raises:
        RefusedError: the data set does not know patients, or a patient has images at two clients.
    """
    if plan.patient_ids is None:
        raise RefusedError(
            "dp: unit=patient, but the data set does not know its patients; if no patient has more than K images at a "
            "client, say so with images_per_patient=K, or use unit=sample"
        )
    owners = Counter(patient for ids in plan.patient_ids for patient in set(ids))
    split = sum(count > 1 for count in owners.values())
    if split:
        raise RefusedError(
            f"dp: unit=patient, but {split} patients have images at several clients, where one client's epsilon does "
            "not cover them; keep patients together with data.unit=patient and another partition, or use unit=sample"
        )
    return plan.patient_ids


def delta_for(units: int, delta: float | None, what: str) -> float:
    """The δ of the claim.

    Raises:
        RefusedError: it is not below 1/n for the largest client, so that losing one unit's privacy outright would be
            within the guarantee.
    """
    chosen = min(1e-5, 1 / (10 * units)) if delta is None else delta
    if chosen >= 1 / units:
        raise RefusedError(
            f"dp: delta={chosen:g} is not below 1/{units}, the largest client's {what}; "
            f"use delta={1 / (10 * units):.1g} or leave it out"
        )
    return chosen


def noise_for(epsilon: float, delta: float, q: float, steps: int, group: int) -> float:
    """The noise multiplier with which groups of so many units spend `epsilon` over all steps."""
    if group == 1:
        return calibrate_noise(epsilon, delta, q, steps)
    start = calibrate_noise(epsilon / group, delta / group, q, steps)
    return smallest(lambda z: compose_group([Gaussian(z, q, steps)], delta, group).epsilon, epsilon, start, 1e-3)


def schedule_of(
    client: int,
    plan: FederationPlan,
    patients: tuple[int, ...] | None,
    images_per_unit: int,
) -> Schedule:
    """A client's sampling; its noise is not known yet.

    Raises:
        ConfigError: the client has no images.
    """
    size = plan.client_sizes[client]
    if size == 0:
        raise ConfigError(f"dp: client {client} has no images; give fewer clients or another partition")
    units = size if patients is None else len(set(patients))
    q = min(1.0, plan.recipe.batch_size / size)
    return Schedule(units, math.nan, q, plan.steps_per_round(client), plan.rounds, patients, images_per_unit)


def step_budget(schedule: Schedule, delta: float, max_epsilon: float | None, group: int) -> int | None:
    """How many steps `max_epsilon` covers; None: all that are planned."""
    planned = schedule.steps * schedule.rounds
    if max_epsilon is None:
        return None
    mechanism = Gaussian(schedule.noise_multiplier, schedule.q)
    return affordable_steps(mechanism, delta, max_epsilon, planned, group)


def without_amplification(schedule: Schedule, delta: float) -> float:
    """ε where every unit is used once in each epoch and sampling hides nothing (exact Gaussian composition)."""
    steps_an_epoch = math.ceil(1 / schedule.q - 1e-9)
    epochs = math.ceil(schedule.steps * schedule.rounds / steps_an_epoch)
    return compose_group([Gaussian(schedule.noise_multiplier, 1.0, epochs)], delta, 1).epsilon
