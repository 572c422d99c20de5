"""What a trained model can do and how it got there: likelihoods, tasks, samplers compared, pictures."""
