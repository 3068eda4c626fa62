"""Secure aggregation: masks that cancel in the sum, and in nothing else (Bonawitz et al. 2017).

`plugin` is the defense, `aggregator` the round, `protocol` what client and server do in each phase, `fixedpoint` how
numbers become integers, `shamir` how secrets are shared. All cryptography is the library `cryptography`'s.
"""
