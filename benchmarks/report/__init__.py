"""Tables, targets and pictures of a run's results."""
