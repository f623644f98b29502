"""The model: pure nn.Module code that knows nothing of training, files on disk, devices or AWS."""
