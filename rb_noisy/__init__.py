"""rb-noisy: adversarial training when labels are wrong, and its measurement, as an extension of RobustBench."""
