"""What adversaries can do in a federated round: one folder a family."""
