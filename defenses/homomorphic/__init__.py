"""Homomorphic aggregation: the server adds up ciphertexts that it cannot read.

`plugin` is the defense, `aggregator` the round, `parameters` the CKKS sets, `packing` how vectors become blocks,
`workers` the processes that encrypt, `selection` which entries; TenSEAL is imported by the two backends alone.
"""
