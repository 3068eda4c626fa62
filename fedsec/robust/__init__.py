"""The machinery of robust aggregation: geometry of a round's updates, order statistics, rules, and their aggregator.

Rules themselves are defenses; the attacks that search against a rule work on the same geometry.
"""
