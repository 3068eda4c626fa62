"""What participants can do against the attacks: one file a family, each a stack of hooks on the federated round."""
