"""What a run spends of its participants' privacy: exact profiles, accountants, and the ledger of events."""
