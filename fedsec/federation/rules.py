"""Which rule combines the updates of a stack, and which stand beside it to be compared."""

from __future__ import annotations

from fedsec import plugins
from fedsec.defense import Aggregator, Defense
from fedsec.errors import ConfigError
from fedsec.federation.aggregate import WeightedMean
from fedsec.robust.aggregator import RuleAggregator
from fedsec.robust.rule import WeightRule


def choose_aggregator(defenses: tuple[Defense, ...]) -> Aggregator:
    """The one rule of a stack; the weighted mean where it brings none.

    Raises:
        ConfigError: two rules, or a defense that looks at individuals under a rule that hides them.
    """
    rules = [(d.name, rule) for d in defenses if (rule := d.aggregator()) is not None]
    hiding = next((name for name, rule in rules if not rule.sees_individuals), None)
    if len(rules) > 1 and hiding is not None:
        other = next(name for name, _ in rules if name != hiding)
        raise ConfigError(
            f"{other} and {hiding} both aggregate, and {hiding} hides individual updates from the server: choose one "
            "of the two, or clip at the client instead"
        )
    if len(rules) > 1:
        why = next((f". {rule.alone}" for _, rule in rules if rule.alone), "")
        names = " and ".join(name for name, _ in rules)
        raise ConfigError(f"{names} both aggregate; a stack holds one such rule{why}")
    if not rules:
        return WeightedMean()
    rule = rules[0][1]
    for defense in defenses:
        if not rule.sees_individuals and type(defense).on_receive is not Defense.on_receive:
            raise ConfigError(
                f"{defense.name} compares individual updates; {hiding} hides them from the server: "
                "clip at the client instead, or drop one of the two"
            )
    return rule


def with_shadows(aggregator: Aggregator, shadows: str | None) -> Aggregator:
    """The rule with further ones beside it that are evaluated on the same updates and not applied.

    Raises:
        ConfigError: a shadow is no rule that weighs whole updates, or the server sees no individual updates.
    """
    if shadows is None:
        return aggregator
    if not aggregator.sees_individuals:
        raise ConfigError(f"shadow_rules={shadows}: the stack hides individual updates from the server")
    if not isinstance(aggregator, (RuleAggregator, WeightedMean)):
        raise ConfigError(f"shadow_rules={shadows}: they stand beside a robust rule or the plain mean, not this one")
    rules = [plugins.build("defenses", spec) for spec in plugins.parse_stack(shadows)]
    for rule in rules:
        if not isinstance(rule, WeightRule):
            raise ConfigError(f"shadow_rules: {rule.name} does not weigh whole updates; name rules such as krum or dos")
    if isinstance(aggregator, RuleAggregator):
        applied = aggregator.rule
    else:  # the plain mean, as a rule that clips nothing
        applied = plugins.build("defenses", plugins.PluginSpec("fedavg", {"kappa": float("inf")}))
    return RuleAggregator(applied, rules)
