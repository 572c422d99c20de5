"""Training state on disk or in a bucket: sharded, verified when read, complete or invisible."""
