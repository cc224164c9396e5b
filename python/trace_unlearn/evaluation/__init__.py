"""What a model still knows: likelihoods, answers, suites, attacks. Imports the rooms of the method, up to training."""
