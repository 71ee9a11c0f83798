"""What a run did, looked at from inside: weights, trajectories, failures."""
